"""Interactions of players, computed by shapiq from the values of all coalitions of a row."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from mllm_shapx.config.measures import InteractionsConfig
from mllm_shapx.records.measures import Interactions


def interactions_of(
    settings: InteractionsConfig, masks: Sequence[int], payoffs: Sequence[float], num_players: int
) -> Interactions:
    """Return the interactions of an exact game's players; takes about two seconds for 14 of them.

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
