"""Expects how many distinct coalitions several sampling runs need together, without sampling.

mllm_shap's samplers treat players alike, so a coalition's chance of being drawn hangs on its size alone.
All of them begin with the same coalitions (the grand, the empty, then those with or without one player, in
player order); what follows is drawn by each run from a seed of its own, hence independently.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

_LARGEST_TABLE = 62
"""Players beyond which two runs practically never draw the same coalition."""

_BISECTIONS = 60
_NOTHING = 1e-9
"""Pairs below which a size counts as full: rounding, not a coalition."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one run is expected to evaluate on n players."""

    singles: int
    """Coalitions of one player, in player order."""
    complements: int
    """Coalitions that lack one player, in player order; 0 for n = 2, where they are singles."""
    chances: tuple[float, ...]
    """Chance of any other coalition of size s, for s = 0 .. n."""
    evaluations: int
    """Coalitions in all."""

    def has_complements(self, num_players: int) -> bool:
        """Whether every coalition that lacks one of the n players is surely among them."""
        certain = self.singles if num_players == 2 else self.complements  # noqa: PLR2004 -- the same there
        return certain == num_players or self.evaluations == 1 << num_players


@lru_cache(maxsize=4096)
def coverage(explainer_type: str, evaluations: int, num_players: int) -> Coverage:
    """Return what a flat run of `evaluations` coalitions covers.

    `evaluations` is what `flat_coalitions` returns. For the Neyman estimators, whose second phase hangs
    on the model's answers, every size is taken to vary alike.
    """
    n, left = num_players, evaluations - min(2, evaluations)
    explainer_type = explainer_type.removesuffix("_banzhaf")
    if explainer_type in {"leverage", "proxy", "kernel", "loo"}:
        return _of_pairs(explainer_type, evaluations, num_players)
    if explainer_type.endswith("mc"):
        singles = min(left, n)
        complements = min(left - singles, n) if n > 2 else 0  # noqa: PLR2004 -- at n = 2 they are the same
    else:
        pairs = min(left // 2, n)
        singles, complements = (min(left, n), 0) if n <= 2 else (pairs, pairs)  # noqa: PLR2004
    chances = [0.0] * (n + 1)
    left -= singles + complements
    if left > 0 and n <= _LARGEST_TABLE:
        if explainer_type.endswith("mc"):
            _draw_sizes_alike(chances, left)
        elif explainer_type.endswith("cc"):
            _draw_complementary(chances, left, small_first=explainer_type == "limited_cc")
        else:
            _draw_neyman(chances, left, evaluations, standard=explainer_type == "standard_neyman")
    return Coverage(singles, complements, tuple(chances), evaluations)


def _of_pairs(explainer_type: str, evaluations: int, num_players: int) -> Coverage:
    """Return the coverage of the estimators that do not begin with the coalitions of one player."""
    n, chances = num_players, [0.0] * (num_players + 1)
    if explainer_type == "loo":
        return Coverage(n if n == 2 else 0, n if n > 2 else 0, tuple(chances), evaluations)  # noqa: PLR2004
    pairs = max(0, evaluations - 2) // 2
    if n > _LARGEST_TABLE or pairs == 0:
        return Coverage(0, 0, tuple(chances), evaluations)
    if explainer_type == "kernel":
        _raise_all(chances, range(1, n), min(1.0, 2 * pairs / ((1 << n) - 2)))
        return Coverage(0, 0, tuple(chances), evaluations)
    from mllm_shap.estimation.leverage import allocate_pairs

    for size, count in allocate_pairs(n, pairs).items():
        _add_pairs(chances, size, count)
    everyone = n if chances[1] >= 1.0 - _NOTHING else 0
    return Coverage(everyone, everyone if n > 2 else 0, tuple(chances), evaluations)  # noqa: PLR2004


def scattered(evaluations: int, num_players: int) -> Coverage:
    """Return the coverage of a run that evaluates any coalitions: a hierarchical one."""
    share = evaluations / (1 << num_players) if num_players <= _LARGEST_TABLE else 0.0
    return Coverage(0, 0, (min(share, 1.0),) * (num_players + 1), evaluations)


def expected_union(coverages: Sequence[Coverage], num_players: int) -> float:
    """Return how many distinct coalitions the runs are expected to evaluate together."""
    n = num_players
    singles = max(item.singles for item in coverages)
    complements = max(item.complements for item in coverages)
    total = 2.0 + singles + complements
    if n > _LARGEST_TABLE:
        return total + sum(
            max(0, item.evaluations - 2 - item.singles - item.complements) for item in coverages
        )
    for size in range(1, n):
        certain = singles * (size == 1) + complements * (size == n - 1)
        missed = math.prod(1.0 - item.chances[size] for item in coverages)
        total += max(0, math.comb(n, size) - certain) * (1.0 - missed)
    return min(total, float(1 << n))


def _draw_sizes_alike(chances: list[float], left: int) -> None:
    """Monte Carlo: a size at random, then a new coalition of that size, until `left` are found.

    After m draws of each size C (1 - (1 - 1/C)^m) of its C coalitions are known; m is found by bisection.
    """
    n = len(chances) - 1
    counts = {size: math.comb(n, size) for size in range(2, n - 1)}
    if left >= sum(counts.values()):
        _raise_all(chances, counts, 1.0)
        return

    def known(draws: float) -> dict[int, float]:
        return {size: -math.expm1(draws * math.log1p(-1.0 / count)) for size, count in counts.items()}

    low, high = 0.0, 2.0 * left + 1.0
    while sum(counts[size] * share for size, share in known(high).items()) < left:
        high *= 2.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        found = sum(counts[size] * share for size, share in known(middle).items())
        low, high = (middle, high) if found < left else (low, middle)
    for size, share in known(high).items():
        chances[size] = share


def _draw_complementary(chances: list[float], left: int, *, small_first: bool) -> None:
    """Complementary pairs: blocks that cover all players at each size, then pairs of any size."""
    n = len(chances) - 1
    pairs: float = left // 2
    for size in range(2, n // 2 + 1):
        blocks = 1 if 2 * size == n else -(-n // size)
        pairs -= _add_pairs(chances, size, min(pairs, blocks))
    if small_first:
        # The first n draws take a third of the players; known pairs among them are not drawn again.
        size = -(-n // 3)
        draws = min(pairs, n) * (1.0 - chances[size])
        pairs -= _add_pairs(chances, size, draws) if size > 1 else 0
    _fill_alike(chances, 2.0 * pairs)


def _draw_neyman(chances: list[float], left: int, evaluations: int, *, standard: bool) -> None:
    """Neyman: passes of one pair per player at each size, then more of the sizes that had a pass.

    A size without a pass has no variance to its name and gets pairs only when the others are full.
    """
    n = len(chances) - 1
    pairs: float = left // 2
    wanted = max(2, math.ceil(evaluations / (2 * n * n))) + standard
    seen = []
    for size in range(2, n // 2 + 1):
        for _ in range(1 if 2 * size == n else wanted):
            if pairs < n:
                break
            pairs -= _add_pairs(chances, size, n * (1.0 - chances[size]))
            seen.append(size)
    # Neyman's weights for equal variances.
    weights = {size: 1.0 if 2 * size == n else math.sqrt(n / size + n / (n - size)) for size in seen}
    pairs -= _share_out(chances, pairs, weights)
    _fill_alike(chances, 2.0 * pairs)


def _share_out(chances: list[float], pairs: float, weights: dict[int, float]) -> float:
    """Add pairs to each size by its weight, until all are placed or the sizes are full; return how many."""
    n = len(chances) - 1
    room = {size: (1.0 - chances[size]) * _pairs_of(n, size) for size in weights}
    placed = 0.0
    while room and pairs - placed > _NOTHING:
        level = min(
            (pairs - placed) / sum(weights[size] for size in room),
            *(space / weights[size] for size, space in room.items()),
        )
        for size in list(room):
            placed += _add_pairs(chances, size, level * weights[size])
            room[size] -= level * weights[size]
            if room[size] <= _NOTHING:
                del room[size]
    return placed


def _pairs_of(num_players: int, size: int) -> float:
    count = math.comb(num_players, size)
    return count / 2 if 2 * size == num_players else float(count)


def _add_pairs(chances: list[float], size: int, pairs: float) -> float:
    """Add pairs of coalitions of `size` and their complements; return how many were new."""
    n = len(chances) - 1
    room = (1.0 - chances[size]) * _pairs_of(n, size)
    added = min(pairs, room)
    chances[size] = min(1.0, chances[size] + added / _pairs_of(n, size))
    chances[n - size] = chances[size]
    return added


def _fill_alike(chances: list[float], left: float) -> None:
    """Spread `left` coalitions evenly over those that are not known yet."""
    n = len(chances) - 1
    unseen = sum((1.0 - chances[size]) * math.comb(n, size) for size in range(2, n - 1))
    if unseen > 0.0:
        _raise_all(chances, range(2, n - 1), min(1.0, left / unseen))


def _raise_all(chances: list[float], sizes: Iterable[int], share: float) -> None:
    for size in sizes:
        chances[size] += (1.0 - chances[size]) * share
