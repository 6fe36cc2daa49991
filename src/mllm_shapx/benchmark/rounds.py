"""The contest: in each round, all contestants take turns on the same rows."""

import asyncio
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

from mllm_shap import ConversationSnapshot

from mllm_shapx.benchmark.library import LibraryResult, LibraryRunner
from mllm_shapx.benchmark.options import LIBRARY_SHARE, BenchOptions
from mllm_shapx.benchmark.ours import Explainer, Turn
from mllm_shapx.benchmark.subject import Game
from mllm_shapx.models.flight import FEWEST_ROWS

MOST_ROUNDS = 5
"""Maximum number of rounds; medians are over the rounds."""
MOST_REPEATS = 4
"""Maximum turns of the fast contestants before and after the library's one."""
WORTH_ALL = 2.0
"""The library plays a round's whole games if they take at most this multiple of its share of the time."""
WORTH_ALL_ASKED_FOR = 10.0
"""The same if the user gives the number of rows."""


class Prompts(Protocol):
    """A contestant that only answers prompts."""

    def seconds_for(self, snapshots: Sequence[ConversationSnapshot]) -> float:
        """Return the seconds to answer all."""


@dataclass(slots=True)
class Tally:
    """One contestant's coalitions and seconds of each round, or of each turn."""

    rounds: list[tuple[float, float]] = field(default_factory=list)

    def add(self, coalitions: float, seconds: float) -> None:
        """Add one round."""
        self.rounds.append((coalitions, seconds))

    @property
    def coalitions(self) -> float:
        """Return the coalitions of all rounds."""
        return sum(coalitions for coalitions, _ in self.rounds)

    @property
    def seconds(self) -> float:
        """Return the seconds of all rounds."""
        return sum(seconds for _, seconds in self.rounds)

    @property
    def median_rate(self) -> float | None:
        """Return the median over the rounds of coalitions per second; None without a turn."""
        if not self.rounds:
            return None
        return statistics.median(coalitions / seconds for coalitions, seconds in self.rounds)

    @property
    def total_rate(self) -> float | None:
        """Return all coalitions divided by all seconds."""
        return self.coalitions / self.seconds if self.rounds else None


@dataclass(slots=True)
class Contest:
    """The results of the rounds."""

    ours: Tally = field(default_factory=Tally)
    library: Tally = field(default_factory=Tally)
    raw: Tally = field(default_factory=Tally)
    turns: list[Turn] = field(default_factory=list)
    """Our turns, without their prompts."""
    library_sampled: bool = False
    """Whether the library got fewer coalitions of a row than we."""
    compared_rows: int = 0
    """Rows with equal games on both sides, so that their values could be compared."""
    largest_difference: float | None = None
    """Maximum difference between our values and the library's."""


@dataclass(frozen=True, slots=True)
class Contestants:
    """The contestants."""

    ours: Explainer
    library: LibraryRunner | None
    library_rate: float
    """Approximate coalitions per second."""
    raw: Prompts | None
    comparable: bool
    """Whether the library's values must equal ours."""


def cut_into_rounds(games: Sequence[Game], fewest: int) -> list[Sequence[Game]]:
    """Cut the games into at most `MOST_ROUNDS` equal rounds of neighbours, of at least `fewest` games."""
    count = max(1, min(MOST_ROUNDS, len(games) // fewest))
    edges = [round(place * len(games) / count) for place in range(count + 1)]
    return [games[first:last] for first, last in pairwise(edges)]


async def contest(
    games: Sequence[Game], contestants: Contestants, options: BenchOptions, say: Callable[[str], None]
) -> Contest:
    """Play all rounds; each contestant gets about `options.seconds` in total.

    In each round, the library plays in the middle and the others before and after it, so that other load on
    the machine affects all equally.
    """
    result = Contest()
    rounds = cut_into_rounds(games, contestants.ours.flight.fixed or FEWEST_ROWS)
    for number, played in enumerate(rounds, start=1):
        say(f"round {number} of {len(rounds)}: {len(played)} row(s)")
        turns = _Round(played, contestants, options.seconds / len(rounds), result)
        await turns.play(WORTH_ALL if options.rows is None else WORTH_ALL_ASKED_FOR)
    return result


class _Round:
    def __init__(
        self, games: Sequence[Game], contestants: Contestants, seconds: float, result: Contest
    ) -> None:
        self._games = games
        self._with = contestants
        self._seconds = seconds
        self._result = result
        self._ours, self._raw = Tally(), Tally()

    async def play(self, patience: float) -> None:
        """Take all turns and add them up; the library may use `patience` times its time."""
        first = await self._our_turn()
        prompts = first.prompts
        await self._raw_turn(prompts)
        spare = self._seconds / (self._ours.seconds + self._raw.seconds)
        repeats = max(1, min(MOST_REPEATS, math.floor(spare / 2))) - 1
        await self._repeat(repeats, prompts)
        await self._library_turn(first, patience)
        await self._repeat(repeats + 1, prompts)
        self._result.ours.add(self._ours.coalitions, self._ours.seconds)
        if self._with.raw is not None:
            self._result.raw.add(self._raw.coalitions, self._raw.seconds)

    async def _repeat(self, times: int, prompts: Sequence[ConversationSnapshot]) -> None:
        for _ in range(times):
            await self._our_turn()
            await self._raw_turn(prompts)

    async def _our_turn(self) -> Turn:
        turn = await self._with.ours.play(self._games)
        self._result.turns.append(replace(turn, prompts=[]))
        self._ours.add(turn.coalitions, turn.seconds)
        return turn

    async def _raw_turn(self, prompts: Sequence[ConversationSnapshot]) -> None:
        if self._with.raw is not None:
            seconds = await asyncio.to_thread(self._with.raw.seconds_for, prompts)
            # Coalitions with equal prompts are answered once, by us and here.
            self._raw.add(sum(game.coalitions for game in self._games), seconds)

    async def _library_turn(self, ours: Turn, patience: float) -> None:
        if self._with.library is None:
            return
        affordable = self._with.library_rate * LIBRARY_SHARE * self._seconds
        results = []
        if sum(game.coalitions for game in self._games) <= patience * affordable:
            results = [await self._with.library.explain(game) for game in self._games]
            self._compare(ours, results)
        else:
            self._result.library_sampled = True
            results = [await self._with.library.explain(self._games[0].limited_to(int(affordable)))]
        self._result.library.add(
            sum(result.coalitions for result in results), sum(result.seconds for result in results)
        )

    def _compare(self, ours: Turn, theirs: Sequence[LibraryResult]) -> None:
        if not self._with.comparable:
            return
        for sample, result in zip(ours.samples, theirs, strict=True):
            values = sample.player_values()
            if len(values) != len(result.values):
                continue  # our token filter removed players
            differences = [
                abs((own or 0.0) - other) for own, other in zip(values, result.values, strict=True)
            ]
            largest = max(*differences, self._result.largest_difference or 0.0)
            self._result.largest_difference = largest
            self._result.compared_rows += 1
