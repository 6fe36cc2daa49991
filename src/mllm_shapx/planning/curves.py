"""Counts the coalitions of a run's faithfulness curves."""

from math import comb

from mllm_shapx.config.measures import FaithfulnessConfig


def kept_counts(steps: int, num_players: int) -> tuple[int, ...]:
    """Return the players kept at each point of a curve: from 0 to all, in equal steps of whole players."""
    steps = min(steps, num_players)
    return (0, *((2 * step * num_players + steps) // (2 * steps) for step in range(1, steps + 1)))


def curve_coalitions(faithfulness: FaithfulnessConfig | None, num_players: int) -> int:
    """Return the most coalitions that the curves need besides the empty and the grand one."""
    if faithfulness is None:
        return 0
    orders = faithfulness.random + 2  # deletion and insertion of the explained order
    inner = kept_counts(faithfulness.steps, num_players)[1:-1]
    if orders <= num_players:
        return orders * len(inner)
    return sum(min(orders, comb(num_players, kept)) for kept in inner)
