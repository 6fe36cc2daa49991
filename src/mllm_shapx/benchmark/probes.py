"""Which batch size and how many rows in flight suit this model and machine, found by trying them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.benchmark.ours import Borrowed, Explainer
from mllm_shapx.benchmark.subject import Game
from mllm_shapx.models.base import Model

ROWS_IN_FLIGHT = (1, 2, 4)
SMALLEST_SIZE, LARGEST_SIZE = 8, 4096
CLEARLY = 1.03
"""A larger setting must be faster by this factor to be worth it."""
SLOWER = 0.9
"""A batch size below this share of the best rate ends the walk that came to it."""
FLIGHTS_SHARE = 0.4
"""Share of the time that is kept for trying rows in flight."""
PROMISING = 0.7
"""Settings above this share of the best rate are tried twice."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One setting tried."""

    batch_size: int | None
    """None for `auto`."""
    rows_in_flight: int
    coalitions_per_second: float
    engine_batch_size: int
    """What the engine worked with in the end."""

    def to_json(self) -> dict[str, Any]:
        """Return the probe as JSON data."""
        return {
            "batch_size": "auto" if self.batch_size is None else self.batch_size,
            "rows_in_flight": self.rows_in_flight,
            "coalitions_per_second": self.coalitions_per_second,
            "engine_batch_size": self.engine_batch_size,
        }


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to write into the config and to give to `run`."""

    batch_size: int
    rows_in_flight: int
    probes: tuple[Probe, ...]


class Prober:
    """Tries settings on the same games.

    Args:
        model: The loaded model; it stays loaded.
        games: Played once for each setting, several at a time.
        largest: No batch larger than this is tried.
        say: Told what is going on.
    """

    def __init__(self, model: Model, games: Sequence[Game], largest: int, say: Callable[[str], None]) -> None:
        self._model = model
        self._games = games
        self._largest = largest
        self._say = say
        self._deadline = 0.0

    async def recommend(self, rows_in_flight: int, seconds: float) -> Recommendation:
        """Try batch sizes around the automatic one, then rows in flight with the best batch size.

        After `seconds` nothing new is begun: on a slow model what was tried until then has to do.
        """
        self._deadline = time.monotonic() + seconds * (1 - FLIGHTS_SHARE)
        sizes = [await self._try(None, rows_in_flight)]
        found = sizes[0].engine_batch_size
        await self._walk(sizes, [found >> step for step in range(1, found.bit_length())])
        await self._walk(sizes, [found << step for step in range(1, LARGEST_SIZE.bit_length())])
        sizes = await self._again(sizes)
        best = _best(sizes)
        self._deadline += seconds * FLIGHTS_SHARE
        others = [flight for flight in ROWS_IN_FLIGHT if flight != rows_in_flight]
        tried = [await self._try(best.batch_size, flight) for flight in others if self._has_time()]
        flights = await self._again([best, *tried])
        chosen = _best(flights, key=lambda probe: probe.rows_in_flight)
        return Recommendation(best.engine_batch_size, chosen.rows_in_flight, (*sizes, *flights[1:]))

    async def _walk(self, probes: list[Probe], sizes: Sequence[int]) -> None:
        """Try one size after the other until they get clearly slower."""
        for size in sizes:
            if not SMALLEST_SIZE <= size <= self._largest or not self._has_time():
                break
            probe = await self._try(size, probes[0].rows_in_flight)
            probes.append(probe)
            fastest = max(each.coalitions_per_second for each in probes)
            if probe.coalitions_per_second < SLOWER * fastest:
                break

    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline

    async def _again(self, probes: Sequence[Probe]) -> list[Probe]:
        """Try the promising ones once more, the last first, and keep each one's better rate.

        What else the machine does comes in bursts; a rate that was good once was not a burst.
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

    async def _try(self, batch_size: int | None, rows_in_flight: int) -> Probe:
        shown = "auto" if batch_size is None else batch_size
        self._say(f"trying batch size {shown} with {rows_in_flight} row(s) in flight")
        explainer = Explainer(Borrowed(self._model, batch_size), rows_in_flight)
        try:
            if batch_size is None:
                await explainer.play(self._games)  # it finds its size
            turn = await explainer.play(self._games)
            size = explainer.engine.stats.batch_size
        finally:
            await explainer.engine.aclose()
        return Probe(batch_size, rows_in_flight, turn.coalitions / turn.seconds, size)


def _best(
    probes: Sequence[Probe], key: Callable[[Probe], int] = lambda probe: probe.engine_batch_size
) -> Probe:
    """Return the fastest probe, or one that is smaller by `key` and hardly slower."""
    fastest = max(probe.coalitions_per_second for probe in probes)
    close = [probe for probe in probes if probe.coalitions_per_second * CLEARLY >= fastest]
    return min(close, key=key)
