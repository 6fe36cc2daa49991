"""How far two runs agree on one row: errors, correlations, the most important players, signs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.changed_rows import same_content
from mllm_shapx.reporting.pieces import prompt_pieces

TOP_K = 3
"""Players that count as the most important ones, by the size of their values."""


class Obstacle(Enum):
    """Why two samples of one row cannot be compared."""

    OTHER_PROMPT = "other prompts"
    OTHER_PLAYERS = "other players"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two runs on one row; None where a figure has no meaning there."""

    error: float
    """Mean over players of |difference of the two values|."""
    squared_error: float
    """Mean over players of the squared difference."""
    pearson: float | None
    """None for fewer than two players or where one side's values are all equal."""
    spearman: float | None
    """Rank correlation; equal values share their mean rank."""
    top: float | None
    """Share of the k most important players that both have; None where there are no more than k."""
    same_first: bool
    """Whether the most important player is the same."""
    players: int
    sign_changes: int
    """Players whose value is positive in one run and negative in the other."""
    same_answer: bool
    """Whether the model's answer to the whole prompt is the same."""


def compare_samples(one: SampleResult, other: SampleResult, top_k: int = TOP_K) -> Agreement | Obstacle:
    """Return how far two samples of a row agree, or why they cannot be compared.

    Players whose value is not finite in one of them are left out.
    """
    if not same_content(one, other):
        return Obstacle.OTHER_PROMPT
    first, second = prompt_pieces(one), prompt_pieces(other)
    labels = [[(piece.text, piece.num_bytes, piece.turn) for piece in side] for side in (first, second)]
    if labels[0] != labels[1] or one.num_players != other.num_players:
        return Obstacle.OTHER_PLAYERS
    pairs = [
        (left.value, right.value)
        for left, right in zip(first, second, strict=True)
        if left.value is not None and right.value is not None
    ]
    if not pairs:
        return Obstacle.OTHER_PLAYERS
    return _agreement(pairs, top_k, same_answer=one.response == other.response)


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Pearson's correlation, None for fewer than two points or a constant side."""
    return _correlation(first, second, "linear")


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, None for fewer than two points or a constant side."""
    return _correlation(first, second, "ranked")


def most_important(values: Sequence[float], count: int = 1) -> list[int]:
    """Return the positions of the values of largest size; of equal ones the first."""
    return sorted(range(len(values)), key=lambda position: -abs(values[position]))[:count]


def _agreement(pairs: Sequence[tuple[float, float]], top_k: int, *, same_answer: bool) -> Agreement:
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    shared = set(most_important(first, top_k)) & set(most_important(second, top_k))
    return Agreement(
        error=math.fsum(abs(left - right) for left, right in pairs) / len(pairs),
        squared_error=math.fsum((left - right) ** 2 for left, right in pairs) / len(pairs),
        pearson=pearson(first, second),
        spearman=spearman(first, second),
        top=len(shared) / top_k if len(pairs) > top_k else None,
        same_first=most_important(first) == most_important(second),
        players=len(pairs),
        sign_changes=sum(left * right < 0 for left, right in pairs),
        same_answer=same_answer,
    )


def _correlation(first: Sequence[float], second: Sequence[float], method: str) -> float | None:
    try:
        found = statistics.correlation(first, second, method=method)  # type: ignore[arg-type]
    except statistics.StatisticsError:
        return None
    return max(-1.0, min(1.0, found))
