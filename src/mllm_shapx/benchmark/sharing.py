"""Coalitions that the config's sweep evaluates per generated answer, on some rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from mllm_shapx.benchmark.ours import Explainer
from mllm_shapx.benchmark.subject import Game
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import expected_answers, explaining_order, runs_by_key


@dataclass(slots=True)
class Sharing:
    """Evaluated coalitions and generated answers of all runs of a sweep."""

    rows: int = 0
    coalitions: float = 0
    answers: float = 0
    measured: bool = False
    """Whether the runs were played; otherwise the plan's expectation for one row."""

    @property
    def factor(self) -> float | None:
        """Return coalitions per answer; None if no run of the sweep can explain the rows."""
        return self.coalitions / self.answers if self.answers else None


async def measure_sharing(
    ours: Explainer, games: Sequence[Game], sweep: Sequence[RunSpec], most_answers: float
) -> Sharing:
    """Explain rows by the whole sweep, with at most `most_answers` answers in total."""
    found = Sharing(measured=True)
    for game in games:
        runs = _possible(sweep, game)
        expected = _expected(runs, game)
        if not runs or found.answers + expected > most_answers:
            continue
        coalitions, answers = await ours.play_sweep(game, runs)
        found.rows += 1
        found.coalitions += coalitions
        found.answers += answers
    return found if found.rows else _planned(games[0], sweep)


def _planned(game: Game, sweep: Sequence[RunSpec]) -> Sharing:
    runs = _possible(sweep, game)
    coalitions = sum(run.coalitions(game.num_players) for run in runs)
    return Sharing(rows=1 if runs else 0, coalitions=coalitions, answers=_expected(runs, game))


def _possible(sweep: Sequence[RunSpec], game: Game) -> list[RunSpec]:
    runs = [run for run in sweep if not run.is_hopeless(game.num_players)]
    return explaining_order(runs, game.num_players)


def _expected(runs: Sequence[RunSpec], game: Game) -> float:
    return sum(expected_answers(sharing, game.num_players) for sharing in runs_by_key(runs).values())
