"""Which batch size and how many rows in flight suit this model and machine, found by trying them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.benchmark.ours import Borrowed, Explainer
from mllm_shapx.benchmark.subject import Game
from mllm_shapx.models.base import Model

ROWS_IN_FLIGHT = (1, 2, 4)
BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
CLEARLY = 1.03
"""A larger setting must be faster by this factor to be worth it."""
SLOWER = 0.9
"""A batch size below this share of the best rate ends the search."""
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
        games: Played once for each setting, several at a time, after a warm-up on the first of them.
        largest: No batch larger than this is tried.
        say: Told what is going on.
    """

    def __init__(self, model: Model, games: Sequence[Game], largest: int, say: Callable[[str], None]) -> None:
        self._model = model
        self._games = games
        self._largest = largest
        self._say = say

    async def recommend(self, rows_in_flight: int) -> Recommendation:
        """Try batch sizes with `rows_in_flight`, then rows in flight with the best batch size."""
        sizes = [await self._try(None, rows_in_flight)]
        for size in BATCH_SIZES:
            if size > self._largest:
                break
            sizes.append(await self._try(size, rows_in_flight))
            fastest = max(probe.coalitions_per_second for probe in sizes)
            if sizes[-1].coalitions_per_second < SLOWER * fastest and size > _best(sizes).engine_batch_size:
                break
        sizes = await self._again(sizes)
        best = _best(sizes)
        flights = [best] + [
            await self._try(best.batch_size, flight) for flight in ROWS_IN_FLIGHT if flight != rows_in_flight
        ]
        flights = await self._again(flights)
        chosen = _best(flights, key=lambda probe: probe.rows_in_flight)
        return Recommendation(best.engine_batch_size, chosen.rows_in_flight, (*sizes, *flights[1:]))

    async def _again(self, probes: Sequence[Probe]) -> list[Probe]:
        """Try the promising ones once more, the last first, and keep each one's better rate.

        What else the machine does comes in bursts; a rate that was good once was not a burst.
        """
        fastest = max(probe.coalitions_per_second for probe in probes)
        found = []
        for probe in reversed(probes):
            if probe.coalitions_per_second < PROMISING * fastest:
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
            await explainer.play(self._games[:1] if batch_size else self._games)
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
