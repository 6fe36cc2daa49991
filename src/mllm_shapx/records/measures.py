"""Further measures of a sample: faithfulness curves and interactions (docs/formats.md)."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from mllm_shapx.records.fields import STRICT, AllKnown, Known, Whole

_TIE = 1e-12
"""Areas that differ by less are equal: their sums have different orders."""


@dataclass(frozen=True, slots=True)
class Areas:
    """Areas under the curves, over the share of players kept: means of the value function."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    deletion: Known
    """Small when the highest values belong to the players that the answer depends on."""
    insertion: Known
    """Large in the same case."""
    random: Known
    """Mean over the random orders."""

    @property
    def deletion_is_better(self) -> bool:
        """Whether the answer changes faster than with random deletions."""
        return self.deletion < self.random - _TIE

    @property
    def insertion_is_better(self) -> bool:
        """Whether the answer returns faster than with random players kept."""
        return self.insertion > self.random + _TIE


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Values of coalitions that keep from no to all players, in several orders of the players."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kept: tuple[Whole, ...]
    """Players kept at each point of every curve, from 0 to all."""
    deletion: AllKnown
    """The players with the lowest values are kept: in reverse, the highest are deleted first."""
    insertion: AllKnown
    """The players with the highest values are kept."""
    random: tuple[AllKnown, ...]
    """A curve for each random order."""
    areas: Areas


@dataclass(frozen=True, slots=True)
class Interactions:
    """Interactions of sets of players."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    index: str
    order: Whole
    players: tuple[tuple[Whole, ...], ...]
    """Sets of 1 to `order` players, as indices into `raw_values`."""
    values: AllKnown
    """One per set, before any normalizer."""
