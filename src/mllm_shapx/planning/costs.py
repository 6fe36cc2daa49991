"""What an answer costs: device seconds by generation settings and prompt size, from what was measured."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

_Name = tuple[str, str]
_BASE = ("base", "")
_PRESENT = ("present", "")

NOISE = 0.25
"""Relative spread between measurements of the same work."""
SPREAD_OF_SLOPE = 0.5
"""How far the players present are expected to decide an answer's cost, relative to it, at first."""
SPREAD_OF_KEYS = 0.7
"""The same of generation settings."""
LEAST_MEASUREMENTS = 3
LEAST_COST = 0.1
"""Share of the mean cost that no prediction falls below."""
EARLY_S = 6.0
"""Seconds for which everything is slower: devices warm up, and batches are small yet."""
MOST_SLOWER = 2.0
"""Factor by which everything is taken to be slower then, at most."""
EARLY_WEIGHT = 0.2
"""What a measurement of that time counts beside a later one."""
TURNS = 5
"""Turns in which costs and that factor are found from each other."""
HALF_LIFE_S = 300.0
"""Least age at which a measurement counts half for what answers cost beside one another; later the time since
the first one."""
LEVEL_HALF_LIFE_S = 10.0
"""The same for the level of all costs; later a quarter of the time since the first measurement."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers of one cost key."""

    answers: int = 0
    present: int = 0
    """Players present in their coalitions, in sum."""

    def plus(self, mask: int) -> "Generated":
        """Return this with one more answer, to the coalition `mask`."""
        return Generated(self.answers + 1, self.present + mask.bit_count())

    def since(self, before: "Generated") -> "Generated":
        """Return what came after `before`."""
        return Generated(self.answers - before.answers, self.present - before.present)


class _Moments:
    """What a regression needs of its measurements, and what these are in sum."""

    def __init__(self) -> None:
        self.products: defaultdict[tuple[_Name, _Name], float] = defaultdict(float)
        self.targets: defaultdict[_Name, float] = defaultdict(float)
        self.sums: defaultdict[_Name, float] = defaultdict(float)
        self.busy = 0.0

    def add(self, features: Mapping[_Name, float], busy: float, answers: int, weight: float = 1.0) -> None:
        """Add a measurement: the features of a mean answer, and the seconds that all took."""
        for one, value in features.items():
            self.targets[one] += weight * value * busy / answers
            self.sums[one] += weight * value * answers
            for other, second in features.items():
                self.products[one, other] += weight * value * second
        self.busy += weight * busy

    def fade(self, keep: float) -> None:
        """Let everything count less."""
        for sums in (self.products, self.targets, self.sums):
            for name in sums:
                sums[name] *= keep  # type: ignore[index]
        self.busy *= keep

    def level(self, costs: Mapping[_Name, float]) -> float:
        """Return what the measurements took over what they would take at these costs."""
        met = sum(value * self.sums.get(name, 0.0) for name, value in costs.items())
        return self.busy / met if met > 0.0 else 1.0


class AnswerCost:
    """Predicts the device seconds of an answer.

    An answer is taken to cost `base + slope * players present`, both hanging on its cost key
    (`RunSpec.cost_key`): longer prompts cost more, and so do settings that generate more tokens. It is a
    ridge regression on the measurements so far, pulled towards one cost for all answers while these say
    little. The first measurements are slower by a factor that is estimated with it, and what was done lately
    is met in sum.
    """

    def __init__(self) -> None:
        self._early, self._later, self._lately = _Moments(), _Moments(), _Moments()
        self._count = 0
        self._times: tuple[float, float] | None = None
        self._solution: dict[_Name, float] | None = None

    def observe(self, at: float, busy: float, generated: Mapping[str, Generated]) -> None:
        """Take in that until second `at` a device worked for `busy` seconds on these answers."""
        answers = sum(each.answers for each in generated.values())
        if not answers:
            return
        first = self._age(at)
        features = {_BASE: 1.0, _PRESENT: sum(each.present for each in generated.values()) / answers}
        for key, each in generated.items():
            if not each.answers:
                continue
            features["base", key] = each.answers / answers
            features["present", key] = each.present / answers
        if at - first < EARLY_S:
            self._early.add(features, busy, answers, EARLY_WEIGHT)
            self._lately.add(features, busy, answers, EARLY_WEIGHT)
        else:
            self._later.add(features, busy, answers)
            self._lately.add(features, busy, answers)
        self._count += 1
        self._solution = None

    def seconds(self, key: str, present: float) -> float | None:
        """Return the device seconds of an answer to so many players; None while too little was measured."""
        if self._count < LEAST_MEASUREMENTS or self._lately.busy <= 0.0:
            return None
        if self._solution is None:
            self._solution = self._solve()
        found = self._solution
        slope = found[_PRESENT] + found.get(("present", key), 0.0)
        usual = self._usual(key)
        middle = found[_BASE] + found.get(("base", key), 0.0) + slope * usual
        least = LEAST_COST * self._lately.busy / self._lately.sums[_BASE]
        middle = max(middle, least)
        # More players cost more, and twice as many not more than twice, however few measurements mislead.
        slope = min(max(slope, 0.0), middle / max(usual, 1e-3))
        return max(least, middle + slope * (present - usual))

    def _usual(self, key: str) -> float:
        """Return the players present in the mean answer measured, of the key where there are such."""
        for base, present in ((("base", key), ("present", key)), (_BASE, _PRESENT)):
            answers, players = (
                self._early.sums.get(name, 0.0) + self._later.sums.get(name, 0.0) for name in (base, present)
            )
            if answers > 0.0:
                return players / answers
        return 0.0

    def _age(self, at: float) -> float:
        """Let what was measured fade; return when the first measurement was."""
        first, last = self._times or (at, at)
        passed = max(0.0, at - last)
        self._times = (first, max(at, last))
        for moments in (self._early, self._later):
            moments.fade(0.5 ** (passed / max(HALF_LIFE_S, at - first)))
        self._lately.fade(0.5 ** (passed / max(LEVEL_HALF_LIFE_S, (at - first) / 4.0)))
        return first

    def _solve(self) -> dict[_Name, float]:
        import numpy as np

        early, later = self._early, self._later
        names = list(self._lately.sums)
        both = [(one, other) for one in names for other in names]
        products = [early.products.get(pair, 0.0) + later.products.get(pair, 0.0) for pair in both]
        matrix = np.array(products).reshape(len(names), len(names))
        usual = self._lately.sums[_PRESENT] / self._lately.sums[_BASE]
        for place, name in enumerate(names):
            matrix[place, place] += self._pull(name, usual)
        at_first = np.array([early.targets.get(name, 0.0) for name in names])
        targets = np.array([later.targets.get(name, 0.0) for name in names])
        slower = 1.0
        for _ in range(TURNS if later.busy > 0.0 else 1):
            costs = np.linalg.solve(matrix, targets + at_first / slower)
            slower = min(max(early.level(dict(zip(names, costs, strict=True))), 1.0), MOST_SLOWER)
        found = dict(zip(names, map(float, costs), strict=True))
        scale = self._lately.level(found)
        return {name: value * scale for name, value in found.items()}

    @staticmethod
    def _pull(name: tuple[str, str], usual: float) -> float:
        """Return the ridge of one coefficient: noise over what is expected of it, squared."""
        if name == _BASE:
            return 1e-6
        if name[0] == "present":
            return (NOISE / SPREAD_OF_SLOPE * max(usual, 1e-3)) ** 2
        return (NOISE / SPREAD_OF_KEYS) ** 2
