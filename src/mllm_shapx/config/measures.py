"""A run's further measures (faithfulness curves, interactions of players), and when its sampling may stop."""

from math import comb
from typing import Annotated, Literal

from pydantic import Field

from mllm_shapx.config.blocks import Block
from mllm_shapx.config.values import AtMost

InteractionIndex = Literal["k-SII", "SII", "STII", "BII"]


class FaithfulnessConfig(Block):
    """Curves of the value function as the most important players are deleted, or kept."""

    steps: Annotated[int, Field(ge=1), AtMost(1000, "for each step asks for one coalition per curve")] = 10
    """Equal steps from no player to all; rows with fewer players take one step per player."""
    random: Annotated[int, Field(ge=1), AtMost(1000, "for each random order asks for a curve")] = 5
    """Random orders for comparison."""

    def kept_counts(self, num_players: int) -> tuple[int, ...]:
        """Return the players kept at each point of a curve: from 0 to all, in equal steps."""
        steps = min(self.steps, num_players)
        return (0, *((2 * step * num_players + steps) // (2 * steps) for step in range(1, steps + 1)))

    def coalitions(self, num_players: int) -> int:
        """Return the most coalitions that the curves need besides the empty and the grand one."""
        orders = self.random + 2  # deletion and insertion of the explained order
        inner = self.kept_counts(num_players)[1:-1]
        if orders <= num_players:  # each step has as many coalitions at least
            return orders * len(inner)
        return sum(min(orders, comb(num_players, kept)) for kept in inner)


class InteractionsConfig(Block):
    """Interactions of the players of an exact run, computed by `shapiq` from the coalitions' values."""

    index: InteractionIndex = "k-SII"
    order: Annotated[int, Field(ge=2), AtMost(4, "for larger sets of players are too many to write")] = 2
    """Size of the largest sets of players; 2 for pairs."""


class StopWhenConfig(Block):
    """When a row's sampling stops before its budget is spent."""

    standard_error: Annotated[float, Field(gt=0.0), AtMost(1e6, "and no value function has values as large")]
    """Largest standard error that a player's value may have, in the unit of the value function."""
