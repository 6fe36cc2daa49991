"""Estimates how long the rest of a study takes, from the measured cost of its answers."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from mllm_shapx.execution.messages import Beat
from mllm_shapx.planning.costs import AnswerCost, Generated
from mllm_shapx.planning.units import NOMINAL_PLAYERS, SCOUTED_AT, WorkUnit

REORDER_S = 30.0
"""Seconds between two corrections of the queue's order."""


class Forecast:
    """Estimates remaining device seconds from heartbeats.

    Args:
        units: The units that are left at the start.
        players: Players of each row; None, or a row missing, where they are not known.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        units: Iterable[WorkUnit],
        players: Mapping[int, int] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device_seconds = 0.0
        """Time that the workers' devices have spent in the model."""
        self.settled_answers = 0.0
        """Expected answers of the units that need nothing more."""
        self.total_answers = 0.0
        """Expected answers of all units."""
        self._cost = AnswerCost()
        self._players = players or {}
        self._clock = clock
        self._calls: defaultdict[tuple[str, int], float] = defaultdict(float)
        for unit in units:
            self._calls[self._kind(unit)] += unit.cost
            self.total_answers += unit.cost
        self._generated = 0
        self._stored: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._measured: dict[str, Beat] = {}
        self._reordered = clock()

    def handed_out(self, unit: WorkUnit, stored: int) -> None:
        """Note that a unit was leased with so many stored answers, which are not generated again."""
        self._stored.setdefault(unit.unit_id, min(float(stored), unit.cost))

    def settled(self, unit: WorkUnit) -> None:
        """Note that a unit is done or given up."""
        self._calls[self._kind(unit)] -= unit.cost
        self.settled_answers += unit.cost

    def observe(self, worker: str, beat: Beat) -> None:
        """Update the cost of answers from a worker's heartbeat."""
        self.device_seconds += max(0.0, beat.busy_seconds - self._busy.get(worker, 0.0))
        self._busy[worker] = beat.busy_seconds
        before, nothing = self._measured.get(worker, Beat((), 0, 0.0)), Generated()
        new = {key: now.since(before.generated.get(key, nothing)) for key, now in beat.generated.items()}
        answers = sum(each.answers for each in new.values())
        if answers > 0:
            self._measured[worker] = beat
            self._generated += answers
            self._cost.observe(self._clock(), beat.busy_seconds - before.busy_seconds, new)

    def is_order_due(self) -> bool:
        """Whether the queue should be sorted again now: its units differ in the cost of an answer."""
        if len({key for key, _ in self._calls}) < 2 or self._clock() - self._reordered < REORDER_S:  # noqa: PLR2004
            return False
        if self.settled_answers < 2 * SCOUTED_AT * (self.settled_answers + sum(self._calls.values())):
            return False  # not all kinds of units have been measured yet
        self._reordered = self._clock()
        return True

    def cost(self, unit: WorkUnit) -> float:
        """Return a unit's device seconds; its expected answers while too little was measured."""
        key, players = self._kind(unit)
        return unit.cost * (self._each(key, players) or 1.0)

    def pace(self, under_way: Iterable[tuple[WorkUnit, float]]) -> dict[str, dict[int, float]]:
        """Return cost key -> players -> device seconds per expected answer, where that is known.

        Args:
            under_way: Units that workers hold, with the answers that each has already.
        """
        share = self._share_generated(self.settled_answers + sum(answers for _, answers in under_way))
        found: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for key, players in self._calls:
            each = self._each(key, players)
            if each is not None:
                found[key][players] = each * share
        return dict(found)

    def seconds_left(self, under_way: Iterable[tuple[WorkUnit, float]]) -> float | None:
        """Return the device seconds that are left; None while too little was measured.

        Args:
            under_way: Units that workers hold, with the answers that each has already.
        """
        left, at_hand = self._calls.copy(), 0.0
        for unit, answers in under_way:
            left[self._kind(unit)] -= answers
            at_hand += answers
        total = 0.0
        for (key, players), calls in left.items():
            each = self._each(key, players)
            if each is None:
                return None
            total += max(0.0, calls) * each
        return total * self._share_generated(self.settled_answers + at_hand)

    def _share_generated(self, done: float) -> float:
        """Return the share of expected answers that were generated: coalitions may have equal prompts."""
        fresh = done - sum(self._stored.values())
        return self._generated / fresh if fresh > 0.0 and self._generated else 1.0

    def _each(self, key: str, players: int) -> float | None:
        # On average every sampler draws coalitions of half of the players.
        return self._cost.seconds(key, players / 2.0)

    def _kind(self, unit: WorkUnit) -> tuple[str, int]:
        return unit.cost_key, self._players.get(unit.row_index, NOMINAL_PLAYERS)
