"""Estimates the remaining device time: planned answers times the measured cost per answer."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from mllm_shapx.execution.messages import Beat
from mllm_shapx.planning.units import SCOUTED_AT, WorkUnit

REORDER_S = 30.0
"""Seconds between two corrections of the queue's order."""
LEAST_MEASUREMENTS = 3
"""Fewest measurements for a prediction."""
HALF_LIFE_S = 10.0
"""Half-life of a measurement, in seconds; half of the time since the first one when that is longer."""
PRIOR_ANSWERS = 4.0
"""Weight, in answers, of the mean of all keys in the mean of one key."""


class AnswerCost:
    """Predicts the device seconds of an answer: a smoothed mean for each cost key (`RunSpec.cost_key`).

    Devices are slow at first, so old measurements lose weight: the shorter the study has run, the faster.
    """

    def __init__(self) -> None:
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._answers: defaultdict[str, float] = defaultdict(float)
        self._measured: defaultdict[str, int] = defaultdict(int)
        self._count = 0
        self._first = self._last = 0.0

    def observe(self, at: float, busy: float, answers: Mapping[str, int]) -> None:
        """Record that until second `at` a device worked for `busy` seconds on `answers` (by cost key).

        Several keys share the seconds in proportion to their costs so far.
        """
        if not any(answers.values()):
            return
        if not self._count:
            self._first = self._last = at
        self._fade(at)
        expected = {key: count * (self._mean(key) or 1.0) for key, count in answers.items()}
        share = busy / sum(expected.values())
        for key, count in answers.items():
            self._busy[key] += expected[key] * share
            self._answers[key] += count
            self._measured[key] += count
        self._count += 1

    def seconds(self, key: str) -> float | None:
        """Return the device seconds of an answer; None before enough measurements."""
        return None if self._count < LEAST_MEASUREMENTS else self._mean(key)

    def _mean(self, key: str) -> float | None:
        """Return the mean of a key; with few measured answers, it is close to the mean of all keys."""
        answers = sum(self._answers.values())
        if not answers:
            return None
        of_all = sum(self._busy.values()) / answers
        if not self._answers.get(key):
            return of_all or None
        # Trust counts all answers: fading does not make a key less certain.
        trust = self._measured[key] / (self._measured[key] + PRIOR_ANSWERS)
        return trust * self._busy[key] / self._answers[key] + (1.0 - trust) * of_all or None

    def _fade(self, at: float) -> None:
        half_life = max(HALF_LIFE_S, (at - self._first) / 2.0)
        keep = 0.5 ** (max(0.0, at - self._last) / half_life)
        self._last = max(self._last, at)
        for sums in (self._busy, self._answers):
            for key in sums:
                sums[key] *= keep


class Forecast:
    """Estimates the remaining device time of `units` from the workers' heartbeats."""

    def __init__(self, units: Iterable[WorkUnit], clock: Callable[[], float] = time.monotonic) -> None:
        self.device_seconds = 0.0
        """Device time of all workers in the model so far."""
        self.settled_answers = 0.0
        """Expected answers of the settled units."""
        self.total_answers = 0.0
        """Expected answers of all units."""
        self.store_hits = 0
        """Answers found in the store instead of generated."""
        self._cost = AnswerCost()
        self._clock = clock
        self._left: defaultdict[str, float] = defaultdict(float)
        for unit in units:
            self.total_answers += unit.cost
            self._left[unit.cost_key] += unit.cost
        self._generated = 0
        self._expected_stored = 0.0
        self._handed_out: set[str] = set()
        self._beats: dict[str, Beat] = {}
        self._reordered = clock()

    def handed_out(self, unit: WorkUnit, stored: int) -> None:
        """Record a leased unit; `stored` of its answers need not be generated."""
        if unit.unit_id not in self._handed_out:
            self._handed_out.add(unit.unit_id)
            self.store_hits += stored
            self._expected_stored += min(float(stored), unit.cost)

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
        """Return measured cost key -> device seconds per expected answer.

        `under_way` has the leased units, each with its number of answers. Coalitions may have equal prompts,
        so fewer answers are generated than expected.
        """
        fresh = self.settled_answers + sum(answers for _, answers in under_way) - self._expected_stored
        share = self._generated / fresh if fresh > 0.0 and self._generated else 1.0
        found = {key: self._cost.seconds(key) for key in self._left}
        return {key: each * share for key, each in found.items() if each is not None}

    def seconds_left(self, under_way: Iterable[tuple[WorkUnit, float]]) -> float | None:
        """Return the remaining device seconds; None before enough is measured. See `pace`."""
        under_way = list(under_way)
        left, pace = self._left.copy(), self.pace(under_way)
        for unit, answers in under_way:
            left[unit.cost_key] -= answers
        if any(key not in pace for key in left):
            return None
        return sum(max(0.0, answers) * pace[key] for key, answers in left.items())
