"""Finds the best batch size and rows in flight for this model and machine by trial."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.benchmark.ours import Borrowed, Explainer
from mllm_shapx.benchmark.subject import Game
from mllm_shapx.models.base import Model

SMALLEST_SIZE, LARGEST_SIZE = 8, 4096
CLEARLY = 1.03
"""A larger setting is chosen only if it is faster by this factor."""
SLOWER = 0.9
"""A batch size below this share of the best rate ends its walk."""
FLIGHTS_SHARE = 0.4
"""Share of the time reserved for trying rows in flight."""
PROMISING = 0.7
"""Settings above this share of the best rate are tried twice."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One setting tried."""

    batch_size: int
    rows_in_flight: int
    coalitions_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Return the probe as JSON data."""
        return {
            "batch_size": self.batch_size,
            "rows_in_flight": self.rows_in_flight,
            "coalitions_per_second": self.coalitions_per_second,
        }


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Settings for the config and for `run`."""

    batch_size: int
    rows_in_flight: int
    probes: tuple[Probe, ...] = ()
    """Empty if there was no time to try any; then the settings are the contest's."""


class Prober:
    """Tries settings on the same games.

    Args:
        model: The loaded model; it stays loaded.
        games: Played once per setting, several at a time.
        largest: Maximum batch size to try.
        say: Called with progress messages.
    """

    def __init__(self, model: Model, games: Sequence[Game], largest: int, say: Callable[[str], None]) -> None:
        self._model = model
        self._games = games
        self._largest = largest
        self._say = say
        self._deadline = 0.0

    async def recommend(self, found: int, rows_in_flight: int, seconds: float) -> Recommendation:
        """Try batch sizes around the `auto` one, then rows in flight with the best of them.

        No new setting starts after `seconds`, so a slow model gets fewer trials.
        """
        self._deadline = time.monotonic() + seconds * (1 - FLIGHTS_SHARE)
        sizes = [await self._try(found, rows_in_flight)]
        await self._walk(sizes, [found >> step for step in range(1, found.bit_length())])
        await self._walk(sizes, [found << step for step in range(1, LARGEST_SIZE.bit_length())])
        sizes = await self._again(sizes)
        best = _best(sizes)
        self._deadline += seconds * FLIGHTS_SHARE
        most = len(self._games)
        others = {1, min(most, rows_in_flight // 2), min(most, 2 * rows_in_flight)} - {0, rows_in_flight}
        tried: list[Probe] = []
        if most > 1:
            tried = [await self._try(best.batch_size, rows) for rows in sorted(others) if self._has_time()]
        flights = await self._again([best, *tried]) if tried else [best]
        chosen = _best(flights, key=lambda probe: probe.rows_in_flight)
        return Recommendation(best.batch_size, chosen.rows_in_flight, (*sizes, *flights[1:]))

    async def _walk(self, probes: list[Probe], sizes: Sequence[int]) -> None:
        """Try the sizes in order until they get clearly slower."""
        for size in sizes:
            if size < SMALLEST_SIZE:
                continue
            if size > self._largest or not self._has_time():
                break
            probe = await self._try(size, probes[0].rows_in_flight)
            probes.append(probe)
            fastest = max(each.coalitions_per_second for each in probes)
            if probe.coalitions_per_second < SLOWER * fastest:
                break

    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline

    async def _again(self, probes: Sequence[Probe]) -> list[Probe]:
        """Try the promising ones again, the last first, and keep each one's better rate.

        Other load on the machine is in bursts, which only lower a rate.
        """
        fastest = max(probe.coalitions_per_second for probe in probes)
        found = []
        for probe in reversed(probes):
            if probe.coalitions_per_second < PROMISING * fastest or not self._has_time():
                found.append(probe)
                continue
            again = await self._try(probe.batch_size, probe.rows_in_flight)
            found.append(max(probe, again, key=lambda each: each.coalitions_per_second))
        return found[::-1]

    async def _try(self, batch_size: int, rows_in_flight: int) -> Probe:
        self._say(f"trying batch size {batch_size} with {rows_in_flight} row(s) in flight")
        explainer = Explainer(Borrowed(self._model, batch_size), rows_in_flight)
        try:
            turn = await explainer.play(self._games)
        finally:
            await explainer.engine.aclose()
        return Probe(batch_size, rows_in_flight, turn.coalitions / turn.seconds)


def _best(probes: Sequence[Probe], key: Callable[[Probe], int] = lambda probe: probe.batch_size) -> Probe:
    """Return the fastest probe, or one with a smaller `key` that is hardly slower."""
    fastest = max(probe.coalitions_per_second for probe in probes)
    close = [probe for probe in probes if probe.coalitions_per_second * CLEARLY >= fastest]
    return min(close, key=key)
