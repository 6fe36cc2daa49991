"""Estimates the remaining device time: planned answers times the measured cost per answer."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from mllm_shapx.execution.messages import Beat
from mllm_shapx.planning.costs import AnswerCost
from mllm_shapx.planning.units import SCOUTED_AT, WorkUnit

REORDER_S = 30.0
"""Seconds between two corrections of the queue's order."""


class Forecast:
    """Estimates the remaining device time from heartbeats.

    Args:
        units: All units of the study.
        clock: Returns the time in seconds.
    """

    def __init__(self, units: Iterable[WorkUnit], clock: Callable[[], float] = time.monotonic) -> None:
        self.device_seconds = 0.0
        """Device time of all workers in the model so far."""
        self.settled_answers = 0.0
        """Expected answers of the settled units."""
        self.total_answers = 0.0
        """Expected answers of all units."""
        self._cost = AnswerCost()
        self._clock = clock
        self._left: defaultdict[str, float] = defaultdict(float)
        for unit in units:
            self.total_answers += unit.cost
            self._left[unit.cost_key] += unit.cost
        self._generated = 0
        self._stored: dict[str, float] = {}
        self._beats: dict[str, Beat] = {}
        self._reordered = clock()

    def handed_out(self, unit: WorkUnit, stored: int) -> None:
        """Record a leased unit; `stored` of its answers need not be generated."""
        self._stored.setdefault(unit.unit_id, min(float(stored), unit.cost))

    def settled(self, unit: WorkUnit) -> None:
        """Record a unit without open runs."""
        self._left[unit.cost_key] -= unit.cost
        self.settled_answers += unit.cost

    def observe(self, worker: str, beat: Beat) -> None:
        """Update the cost of answers from a worker's heartbeat."""
        before = self._beats.get(worker, Beat((), 0, 0.0))
        new = {key: max(0, count - before.generated.get(key, 0)) for key, count in beat.generated.items()}
        if not any(new.values()):
            return  # a batch is running: its time counts with its answers
        self._beats[worker] = beat
        busy = max(0.0, beat.busy_seconds - before.busy_seconds)
        self.device_seconds += busy
        self._generated += sum(new.values())
        self._cost.observe(self._clock(), busy, new)

    def is_order_due(self) -> bool:
        """Whether to correct the queue's order now: only if its units differ in cost per answer."""
        if len(self._left) < 2 or self._clock() - self._reordered < REORDER_S:  # noqa: PLR2004
            return False
        if self.settled_answers < 2 * SCOUTED_AT * (self.settled_answers + sum(self._left.values())):
            return False  # the scouts are not out yet
        self._reordered = self._clock()
        return True

    def cost(self, unit: WorkUnit) -> float:
        """Return a unit's cost in device seconds, or in expected answers before enough is measured."""
        return unit.cost * (self._cost.seconds(unit.cost_key) or 1.0)

    def pace(self, under_way: Iterable[tuple[WorkUnit, float]]) -> dict[str, float]:
        """Return cost key -> device seconds per expected answer, for the measured keys.

        Args:
            under_way: Leased units, each with its number of answers.
        """
        share = self._share_generated(self.settled_answers + sum(answers for _, answers in under_way))
        found = {key: self._cost.seconds(key) for key in self._left}
        return {key: each * share for key, each in found.items() if each is not None}

    def seconds_left(self, under_way: Iterable[tuple[WorkUnit, float]]) -> float | None:
        """Return the remaining device seconds; None before enough is measured.

        Args:
            under_way: Leased units, each with its number of answers.
        """
        under_way = list(under_way)
        left, pace = self._left.copy(), self.pace(under_way)
        for unit, answers in under_way:
            left[unit.cost_key] -= answers
        if any(key not in pace for key in left):
            return None
        return sum(max(0.0, answers) * pace[key] for key, answers in left.items())

    def _share_generated(self, done: float) -> float:
        """Return the generated share of the expected answers: coalitions may have equal prompts."""
        fresh = done - sum(self._stored.values())
        return self._generated / fresh if fresh > 0.0 and self._generated else 1.0
