"""A run's further measures (faithfulness curves, interactions of players), and when its sampling may stop."""

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


class InteractionsConfig(Block):
    """Interactions of the players of an exact run, computed by `shapiq` from the coalitions' values."""

    index: InteractionIndex = "k-SII"
    order: Annotated[int, Field(ge=2), AtMost(4, "for larger sets of players are too many to write")] = 2
    """Size of the largest sets of players; 2 for pairs."""


class StopWhenConfig(Block):
    """When a row's sampling stops before its budget is spent."""

    standard_error: Annotated[float, Field(gt=0.0), AtMost(1e6, "and no value function has values as large")]
    """Largest standard error that a player's value may have, in the unit of the value function."""
