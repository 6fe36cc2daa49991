"""What an answer costs: device seconds by generation settings, from what was measured."""

from collections import defaultdict
from collections.abc import Mapping

LEAST_MEASUREMENTS = 3
"""Measurements before which nothing is predicted."""
HALF_LIFE_S = 10.0
"""Least age at which a measurement counts half; later, half of the time since the first one."""
PRIOR_ANSWERS = 4.0
"""Answers that the mean of all keys counts for in the mean of one."""


class AnswerCost:
    """Predicts the device seconds of an answer: a smoothed mean for each cost key (`RunSpec.cost_key`).

    Devices are slow at first. Old measurements therefore fade, the faster the shorter the study has run.
    """

    def __init__(self) -> None:
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._answers: defaultdict[str, float] = defaultdict(float)
        self._measured: defaultdict[str, int] = defaultdict(int)
        self._count = 0
        self._first = self._last = 0.0

    def observe(self, at: float, busy: float, answers: Mapping[str, int]) -> None:
        """Take in that until second `at` a device worked for `busy` seconds on these answers.

        Args:
            at: Seconds of a clock that does not go back.
            busy: Device seconds.
            answers: Cost key -> answers generated. Several keys share the seconds by what they cost so far.
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
        """Return the device seconds of an answer; None while too little was measured."""
        return None if self._count < LEAST_MEASUREMENTS else self._mean(key)

    def _mean(self, key: str) -> float | None:
        """Return the mean of a key, close to that of all keys while few answers of it were measured."""
        answers = sum(self._answers.values())
        if not answers:
            return None
        of_all = sum(self._busy.values()) / answers
        if not self._answers.get(key):
            return of_all or None
        # A key that was measured long ago has faded, and is known as well as before.
        trust = self._measured[key] / (self._measured[key] + PRIOR_ANSWERS)
        return trust * self._busy[key] / self._answers[key] + (1.0 - trust) * of_all or None

    def _fade(self, at: float) -> None:
        half_life = max(HALF_LIFE_S, (at - self._first) / 2.0)
        keep = 0.5 ** (max(0.0, at - self._last) / half_life)
        self._last = max(self._last, at)
        for sums in (self._busy, self._answers):
            for key in sums:
                sums[key] *= keep
