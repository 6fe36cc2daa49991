"""What an answer costs: device seconds by generation settings and prompt size, from what was measured."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

_BASE = ("base", "")
_PRESENT = ("present", "")

NOISE = 0.15
"""Relative spread between measurements of the same work."""
SPREAD_OF_SLOPE = 0.5
"""How far the players present are expected to decide an answer's cost, relative to it, at first."""
SPREAD_OF_KEYS = 0.7
"""The same of generation settings."""
LEAST_MEASUREMENTS = 3
LEAST_COST = 0.1
"""Share of the mean cost that no prediction falls below."""
HALF_LIFE_S = 60.0
"""Least age at which a measurement counts half; later half of the time since the first one."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers of one generation key."""

    answers: int = 0
    present: int = 0
    """Players present in their coalitions, in sum."""

    def plus(self, mask: int) -> "Generated":
        """Return this with one more answer, to the coalition `mask`."""
        return Generated(self.answers + 1, self.present + mask.bit_count())

    def since(self, before: "Generated") -> "Generated":
        """Return what came after `before`."""
        return Generated(self.answers - before.answers, self.present - before.present)


class AnswerCost:
    """Predicts the device seconds of an answer.

    An answer is taken to cost `base + slope * players present`, both hanging on its generation key: longer
    prompts cost more, and so do settings that generate more tokens. It is a ridge regression on the
    measurements so far, pulled towards one cost for all answers while these say little, and scaled so that
    what was done is met in sum.
    """

    def __init__(self) -> None:
        self._products: defaultdict[tuple[tuple[str, str], tuple[str, str]], float] = defaultdict(float)
        self._targets: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._busy = 0.0
        self._count = 0
        self._times: tuple[float, float] | None = None
        self._solution: dict[tuple[str, str], float] | None = None

    def observe(self, at: float, busy: float, generated: Mapping[str, Generated]) -> None:
        """Take in that until second `at` a device worked for `busy` seconds on these answers."""
        answers = sum(each.answers for each in generated.values())
        if not answers:
            return
        self._age(at)
        features = {_BASE: 1.0, _PRESENT: sum(each.present for each in generated.values()) / answers}
        for key, each in generated.items():
            if not each.answers:
                continue
            features["base", key] = each.answers / answers
            features["present", key] = each.present / answers
        for one, value in features.items():
            self._targets[one] += value * busy / answers
            self._sums[one] += value * answers
            for other, second in features.items():
                self._products[one, other] += value * second
        self._busy += busy
        self._count += 1
        self._solution = None

    def seconds(self, key: str, present: float) -> float | None:
        """Return the device seconds of an answer to so many players; None while too little was measured."""
        if self._count < LEAST_MEASUREMENTS or self._busy <= 0.0:
            return None
        if self._solution is None:
            self._solution = self._solve()
        found = self._solution
        mean = self._busy / self._sums[_BASE]
        base = found[_BASE] + found.get(("base", key), 0.0)
        cost = base + (found[_PRESENT] + found.get(("present", key), 0.0)) * present
        return max(cost, LEAST_COST * mean)

    def _age(self, at: float) -> None:
        """Let measurements fade: what the device did while it warmed up says little."""
        first, last = self._times or (at, at)
        keep = 0.5 ** (max(0.0, at - last) / max(HALF_LIFE_S, (at - first) / 2.0))
        self._times = (first, max(at, last))
        for sums in (self._products, self._targets, self._sums):
            for name in sums:
                sums[name] *= keep  # type: ignore[index]
        self._busy *= keep

    def _solve(self) -> dict[tuple[str, str], float]:
        import numpy as np

        names = list(self._targets)
        matrix = np.array([[self._products.get((one, other), 0.0) for other in names] for one in names])
        usual = self._sums[_PRESENT] / self._sums[_BASE]
        for place, name in enumerate(names):
            matrix[place, place] += self._pull(name, usual)
        found = np.linalg.solve(matrix, np.array([self._targets[name] for name in names]))
        met = sum(value * self._sums[name] for name, value in zip(names, found, strict=True))
        scale = self._busy / met if met > 0.0 else 1.0
        return {name: float(value * scale) for name, value in zip(names, found, strict=True)}

    @staticmethod
    def _pull(name: tuple[str, str], usual: float) -> float:
        """Return the ridge of one coefficient: noise over what is expected of it, squared."""
        if name == _BASE:
            return 1e-6
        if name[0] == "present":
            return (NOISE / SPREAD_OF_SLOPE * max(usual, 1e-3)) ** 2
        return (NOISE / SPREAD_OF_KEYS) ** 2
