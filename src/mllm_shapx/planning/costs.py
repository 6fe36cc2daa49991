"""Predicts the cost of an answer in device seconds, by generation settings, from measurements."""

from collections import defaultdict
from collections.abc import Mapping

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
        """Record that until second `at` a device worked for `busy` seconds on these answers.

        Args:
            at: Seconds of a monotonic clock.
            busy: Device seconds.
            answers: Cost key -> answers generated. Several keys share the seconds in proportion to their
                costs so far.
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
