"""A run's further measures of a row: faithfulness curves, and interactions of players.

Faithfulness is how fast the answer changes when the players with the highest values are deleted. Deletion and
insertion curves follow Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box
Models" (BMVC 2018), with the run's value function in place of a class probability.
"""

import math
import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np

from mllm_shapx.config.measures import FaithfulnessConfig, InteractionsConfig
from mllm_shapx.explaining.values import Value
from mllm_shapx.records.measures import Areas, Faithfulness, Interactions


async def measure_faithfulness(
    settings: FaithfulnessConfig, values: Sequence[float], value: Value, seed: int
) -> tuple[Faithfulness, list[int]]:
    """Return the curves of a row, and the coalitions that they evaluate.

    Args:
        settings: Number of steps and of random orders.
        values: One per player, before the normalizer. Among equal values (to 12 decimals, because of
            rounding), the first player ranks higher.
        value: Scores all coalitions in one call: the curves' coalitions are the corpus.
        seed: Decides the random orders.
    """
    count = len(values)
    kept = settings.kept_counts(count)
    best_first = sorted(range(count), key=lambda player: -round(values[player], 12))
    draw = random.Random(f"faithfulness {seed}")
    orders = [best_first[::-1], best_first]
    orders += [draw.sample(range(count), count) for _ in range(settings.random)]
    masks = [[sum(1 << player for player in order[:number]) for number in kept] for order in orders]
    coalitions = list(dict.fromkeys(mask for curve in masks for mask in curve))
    payoffs = await value.payoffs((1 << count) - 1, coalitions)
    value_of = dict(zip(coalitions, payoffs, strict=True))
    deletion, insertion, *drawn = (tuple(value_of[mask] for mask in curve) for curve in masks)
    areas = Areas(
        deletion=_area(kept, deletion),
        insertion=_area(kept, insertion),
        random=math.fsum(_area(kept, curve) for curve in drawn) / len(drawn),
    )
    return Faithfulness(kept, deletion, insertion, tuple(drawn), areas), coalitions


def interactions_of(
    settings: InteractionsConfig, masks: Sequence[int], payoffs: Sequence[float], num_players: int
) -> Interactions:
    """Return the interactions of an exact game's players, by shapiq; takes about two seconds for 14 players.

    Args:
        settings: Index and order.
        masks: All 2^n coalitions (bit i = player i), in any order.
        payoffs: Their values.
        num_players: n, at least 1.
    """
    from shapiq import ExactComputer

    table, bits = np.empty(1 << num_players), 1 << np.arange(num_players)
    table[list(masks)] = payoffs
    # shapiq refuses an order above the number of players.
    order = min(settings.order, num_players)
    found = ExactComputer(lambda present: table[present @ bits], n_players=num_players)(settings.index, order)
    players = tuple(each for size in range(1, order + 1) for each in combinations(range(num_players), size))
    return Interactions(
        settings.index, settings.order, players, tuple(float(found[each]) for each in players)
    )


def _area(kept: Sequence[int], curve: Sequence[float]) -> float:
    """Return the area under a curve over the share of players kept, by the trapezoidal rule."""
    points = zip(pairwise(kept), pairwise(curve), strict=True)
    return math.fsum((end - start) * (low + high) / 2 for (start, end), (low, high) in points) / kept[-1]
