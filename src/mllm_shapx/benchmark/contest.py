"""The contest: in each round, all contestants take turns on the same rows."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mllm_shapx.benchmark.library import LibraryRunner
from mllm_shapx.benchmark.ours import Explainer
from mllm_shapx.benchmark.plain import PlainGenerate
from mllm_shapx.benchmark.subject import RowRun, take
from mllm_shapx.models.flight import FEWEST_ROWS

MOST_ROUNDS = 5
"""Maximum number of rounds; medians are over the rounds."""
LIBRARY_SHARE = 3.0
"""Multiple of the others' time for the library, by far the slowest."""


@dataclass(slots=True)
class Tally:
    """One contestant's coalitions and seconds of each round, or of each turn of a round."""

    rounds: list[tuple[int, float]] = field(default_factory=list)

    def add(self, coalitions: int, seconds: float) -> None:
        """Add one round."""
        self.rounds.append((coalitions, seconds))

    @property
    def median_rate(self) -> float | None:
        """Return the median over the rounds of coalitions per second; None without a round."""
        if not self.rounds:
            return None
        return statistics.median(coalitions / seconds for coalitions, seconds in self.rounds)

    @property
    def total(self) -> tuple[int, float]:
        """Return the coalitions and the seconds of all rounds."""
        return sum(coalitions for coalitions, _ in self.rounds), sum(seconds for _, seconds in self.rounds)

    def to_json(self) -> list[dict[str, float]]:
        """Return one object for each round."""
        return [
            {"coalitions": coalitions, "seconds": seconds, "coalitions_per_second": coalitions / seconds}
            for coalitions, seconds in self.rounds
        ]


def cut_into_rounds(games: Sequence[RowRun], fewest: int) -> list[Sequence[RowRun]]:
    """Cut the games into at most `MOST_ROUNDS` equal rounds of neighbours, of at least `fewest` games."""
    count = max(1, min(MOST_ROUNDS, len(games) // fewest))
    edges = [round(place * len(games) / count) for place in range(count + 1)]
    return [games[first:last] for first, last in pairwise(edges)]


@dataclass(slots=True)
class Contest:
    """The contestants, which are warm, and their results."""

    explainer: Explainer
    comparable: bool
    """Whether the library's values must equal ours."""
    generate: PlainGenerate | None = None
    runner: LibraryRunner | None = None
    runner_rate: float = 0.0
    """Approximate coalitions per second of `runner`."""
    ours: Tally = field(default_factory=Tally)
    raw: Tally = field(default_factory=Tally)
    library: Tally = field(default_factory=Tally)
    busy_seconds: float = 0.0
    """Part of our time that the device spent in the model."""
    rows_compared: int = 0
    largest_difference: float | None = None
    """Maximum difference between our values and the library's."""

    async def play(self, games: Sequence[RowRun], seconds: float, say: Callable[[str], None]) -> None:
        """Play all rounds in about `seconds` for each contestant, three times as many for the library.

        In each round, the library plays in the middle and the others before and after it, so that other load
        on the machine affects all equally. The library evaluates as many of the round's coalitions as fit its
        time.
        """
        rounds = cut_into_rounds(games, self.explainer.flight.fixed or FEWEST_ROWS)
        share = seconds / len(rounds)
        for number, played in enumerate(rounds, start=1):
            say(f"round {number} of {len(rounds)}: {len(played)} row(s)")
            ours, raw = Tally(), Tally()
            await self._our_turns(played, share / 2, ours, raw)
            if self.runner is not None:
                await self._library_turn(self.runner, played, share)
            await self._our_turns(played, share / 2, ours, raw)
            self.ours.add(*ours.total)
            if raw.rounds:
                self.raw.add(*raw.total)

    async def _our_turns(self, games: Sequence[RowRun], seconds: float, ours: Tally, raw: Tally) -> None:
        """Let us and plain generate take turns until ours took `seconds`."""
        ends = ours.total[1] + seconds
        while True:
            turn = await self.explainer.play(games)
            ours.add(turn.coalitions, turn.seconds)
            self.busy_seconds += turn.busy_seconds
            if self.generate is not None:
                # Coalitions with equal prompts are answered once, by us and here.
                raw.add(turn.coalitions, await asyncio.to_thread(self.generate.seconds_for, turn.prompts))
            if ours.total[1] >= ends:
                return

    async def _library_turn(self, runner: LibraryRunner, games: Sequence[RowRun], seconds: float) -> None:
        most = max(1, int(self.runner_rate * LIBRARY_SHARE * seconds))
        games = take(games, most, most)
        started = time.perf_counter()
        outputs = [await runner.explain(game) for game in games]
        took = time.perf_counter() - started
        self.library.add(sum(output.metrics.requested for output in outputs), took)
        if not self.comparable:
            return
        ours = await self.explainer.play(games)
        for sample, output in zip(ours.samples, outputs, strict=True):
            values, others = sample.player_values(), output.result.values
            if len(values) == len(others):  # else our token filter removed players
                pairs = zip(values, others, strict=True)
                difference = max(abs((own or 0.0) - other) for own, other in pairs)
                self.largest_difference = max(difference, self.largest_difference or 0.0)
                self.rows_compared += 1
