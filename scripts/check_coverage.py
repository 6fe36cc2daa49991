"""Measures how often the exact value is within two standard errors of the estimate, per sampling explainer.

    python scripts/check_coverage.py                      # 1,000 games for each explainer and budget
    python scripts/check_coverage.py --trials 200 --players 12
    python scripts/check_coverage.py --stop-when 0.1      # with experiments[].stop_when

A trial is a new random game with new draws. `smooth` games have weights of single players and interactions of
two and three, like answers; `rough` games have an independent value for every coalition.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import numpy as np
from numpy.typing import NDArray

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.explaining.games import Game, GameResult
from mllm_shapx.explaining.settings import GameSettings
from mllm_shapx.planning.runs import Budget, RunSpec
from mllm_shapx.planning.sweep import expand

type Floats = NDArray[np.float64]

SAMPLING = [name for name, facts in EXPLAINERS.items() if facts.takes_budget and facts.estimator != "proxy"]
"""Explainers with standard errors."""


class Table:
    """A game with a table of the coalitions' values."""

    def __init__(self, values: Floats) -> None:
        self.values = values

    async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
        """See `explaining.values.Value`."""
        del everyone
        return [float(self.values[mask]) for mask in coalitions]


def any_run() -> RunSpec:
    """Return a run for games on tables."""
    config = {
        "experiment_set_id": "coverage",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": "none"},
        "dataset": {"source": "local_parquet", "path": "rows.parquet"},
        "experiments": [{"explainer_type": "exact"}],
    }
    return expand(ExperimentSet.model_validate(config)).runs[0]


RUN = any_run()


def smooth(players: int, draw: np.random.Generator) -> Floats:
    """Return a game of weights and of interactions of two and three players."""
    masks = np.arange(1 << players)
    game = np.zeros(len(masks))
    for size, scale in ((1, 1.0), (2, 0.3), (3, 0.3)):
        for group in itertools.combinations(range(players), size):
            inside = sum(1 << player for player in group)
            game += scale * draw.normal() * ((masks & inside) == inside)
    return game


def rough(players: int, draw: np.random.Generator) -> Floats:
    """Return a game with an independent value for every coalition."""
    return np.asarray(draw.normal(size=1 << players))


KINDS: dict[str, Callable[[int, np.random.Generator], Floats]] = {"smooth": smooth, "rough": rough}


def play(
    game: Floats, explainer: str, budget: Budget, seed: int, stop_when: float | None = None
) -> GameResult:
    """Play one game with one explainer."""
    players = len(game).bit_length() - 1
    settings = GameSettings(explainer, budget, seed, stop_when)
    return asyncio.run(Game(RUN, [1 << player for player in range(players)], 0, Table(game)).play(settings))


def exact_values(game: Floats, explainer: str) -> Floats:
    """Return the values that the explainer estimates."""
    kind = "exact_banzhaf" if EXPLAINERS[explainer].estimand == "banzhaf" else "exact"
    return np.array(play(game, kind, Budget("all"), 0).values)


@dataclass(frozen=True)
class Coverage:
    """The results of one explainer and budget."""

    within: float
    """Share of values within two standard errors, among those with a standard error."""
    known: float
    """Share of values with a standard error."""
    ratio: float
    """Root mean square of the standard errors divided by that of the true errors."""
    coalitions: float
    """Coalitions evaluated, on average."""


def coverage(
    explainer: str, kind: str, *, players: int, budget: int, trials: int, stop_when: float | None = None
) -> Coverage:
    """Return the coverage of the exact values by two standard errors."""
    gaps, errors, values, coalitions = [], [], 0, 0
    for trial in range(trials):
        game = KINDS[kind](players, np.random.default_rng((trial, players)))
        found = play(game, explainer, Budget("num_samples", budget), trial, stop_when)
        values += players
        coalitions += len(found.masks)
        if found.standard_errors is None:
            continue
        exact = exact_values(game, explainer)
        for value, error, true in zip(found.values, found.standard_errors, exact, strict=True):
            if np.isfinite(error):
                gaps.append(abs(value - true))
                errors.append(error)
    if not gaps:
        return Coverage(float("nan"), 0.0, float("nan"), coalitions / trials)
    off, said = np.array(gaps), np.array(errors)
    within = float(np.mean(off <= 2 * said + 1e-12))
    ratio = float(np.sqrt((said**2).mean() / (off**2).mean()))
    return Coverage(within, len(gaps) / values, ratio, coalitions / trials)


@click.command()
@click.option("--trials", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--players", type=click.IntRange(2, 14), default=9, show_default=True)
@click.option("--explainer", "explainers", type=click.Choice(SAMPLING), multiple=True)
@click.option("--stop-when", type=click.FloatRange(0, min_open=True), help="Stop at this standard error.")
def main(trials: int, players: int, explainers: Sequence[str], stop_when: float | None) -> None:
    """Print a table."""
    print(f"{trials:,} trials, {players} players, {1 << players:,} coalitions")
    print("| explainer | game | coalitions | within 2 SE | with SE | RMS SE / RMS error |")
    print("|---|---|---|---|---|---|")
    # With all coalitions nothing would be left to estimate.
    budgets = [int(factor * players**2) for factor in (1, 2, 3)] if stop_when is None else [15 << players - 4]
    named = explainers or [name for name in SAMPLING if stop_when is None or EXPLAINERS[name].grows]
    for explainer, kind, budget in itertools.product(named, KINDS, budgets):
        found = coverage(explainer, kind, players=players, budget=budget, trials=trials, stop_when=stop_when)
        said = (
            f"{found.within:.1%} | {found.known:.1%} | {found.ratio:.2f}" if found.known else "- | 0.0% | -"
        )
        print(f"| {explainer} | {kind} | {found.coalitions:.0f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
