"""The agreement of two runs, on a row and over all: errors, correlations, most important players, signs."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.changed_rows import same_content
from mllm_shapx.reporting.pieces import prompt_pieces
from mllm_shapx.reporting.reading import StudyFiles

TOP_K = 3
"""Players that count as the most important ones, by the size of their values."""


class Obstacle(StrEnum):
    """Why two runs are not compared on a row: the key of the count in JSON data."""

    OTHER_PROMPT = "other_prompts"
    OTHER_PLAYERS = "other_players"
    ONLY_FIRST = "only_first"
    ONLY_SECOND = "only_second"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two runs on one row; None where a figure has no meaning there."""

    difference: float
    """Mean over players of |difference of the two values|."""
    squared_difference: float
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


@dataclass(frozen=True, slots=True)
class AgreementSummary:
    """Means of an `Agreement`'s figures over the compared rows, None where no row has the figure."""

    rows: int
    """Rows that were compared."""
    spearman: float | None
    pearson: float | None
    top: float | None
    same_first: float | None
    sign_changes: float | None
    """Share of all players whose sign differs."""
    difference: float | None
    squared_difference: float | None
    same_answer: float | None
    not_compared: Mapping[Obstacle, int]
    """Number of rows for each obstacle."""

    @property
    def left_out(self) -> int:
        """Rows that are not compared."""
        return sum(self.not_compared.values())

    def left_out_in_words(self, first: str) -> list[str]:
        """Return how many rows are not compared, for each reason; `first` is the first run's name."""
        reasons = {
            Obstacle.OTHER_PROMPT: "are not compared: the runs explained other prompts there",
            Obstacle.OTHER_PLAYERS: "are not compared: the prompts are cut into other players",
            Obstacle.ONLY_FIRST: f"are in {first} alone",
            Obstacle.ONLY_SECOND: "are in this run alone",
        }
        counts = self.not_compared
        return [f"{counts[each]:,} row(s) {why}" for each, why in reasons.items() if counts[each]]


@dataclass
class AgreementTally:
    """The rows of two runs, compared one after another."""

    top_k: int = TOP_K
    agreements: list[Agreement] = field(default_factory=list)
    left_out: Counter[Obstacle] = field(default_factory=Counter)
    """Number of rows that are not compared, by reason."""

    def add(self, first: SampleResult | None, second: SampleResult | None) -> None:
        """Add one row: each run's sample, None where it has none."""
        if first is None or second is None:
            self.left_out[Obstacle.ONLY_FIRST] += first is not None
            self.left_out[Obstacle.ONLY_SECOND] += second is not None
            return
        found = compare_samples(first, second, self.top_k)
        if isinstance(found, Obstacle):
            self.left_out[found] += 1
        else:
            self.agreements.append(found)


class AgainstExact:
    """Each run of a study against the exact run whose values it estimates, on the run's own rows."""

    def __init__(self, study: StudyFiles) -> None:
        """Begin without rows."""
        found = [(run, study.exact_run_for(run)) for run in study.runs]
        self.exact = [None if exact is run else exact for run, exact in found]
        """For each run its exact run; None for an exact run, and where there is none."""
        self.tallies = [AgreementTally() for _ in study.runs]
        """For each run its comparison; the exact run is the first of the two."""
        self._places = [None if exact is None else study.runs.index(exact) for exact in self.exact]

    def add(self, samples: Sequence[SampleResult | None]) -> None:
        """Add one row: a sample for each run, None where it has none."""
        for sample, place, tally in zip(samples, self._places, self.tallies, strict=True):
            if sample is not None and place is not None:
                tally.add(samples[place], sample)


def summary(*tallies: AgreementTally) -> AgreementSummary:
    """Return the figures over all rows of some comparisons."""
    found = [agreement for tally in tallies for agreement in tally.agreements]
    players = sum(each.players for each in found)
    return AgreementSummary(
        rows=len(found),
        spearman=mean([each.spearman for each in found]),
        pearson=mean([each.pearson for each in found]),
        top=mean([each.top for each in found]),
        same_first=mean([each.same_first for each in found]),
        sign_changes=sum(each.sign_changes for each in found) / players if players else None,
        difference=mean([each.difference for each in found]),
        squared_difference=mean([each.squared_difference for each in found]),
        same_answer=mean([each.same_answer for each in found]),
        not_compared={each: sum(tally.left_out[each] for tally in tallies) for each in Obstacle},
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def compare_samples(one: SampleResult, other: SampleResult, top_k: int = TOP_K) -> Agreement | Obstacle:
    """Return how far two samples of a row agree, or why they cannot be compared.

    Players whose value is not finite in one of them are left out.
    """
    if not same_content(one, other):
        return Obstacle.OTHER_PROMPT
    sides = prompt_pieces(one), prompt_pieces(other)
    players = [[(piece.text, piece.num_bytes, piece.turn) for piece in side] for side in sides]
    if players[0] != players[1] or one.num_players != other.num_players:
        return Obstacle.OTHER_PLAYERS
    pairs = [
        (left.value, right.value)
        for left, right in zip(*sides, strict=True)
        if left.value is not None and right.value is not None
    ]
    if not pairs:
        return Obstacle.OTHER_PLAYERS
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    shared = set(most_important(first, top_k)) & set(most_important(second, top_k))
    return Agreement(
        difference=math.fsum(abs(left - right) for left, right in pairs) / len(pairs),
        squared_difference=math.fsum((left - right) ** 2 for left, right in pairs) / len(pairs),
        pearson=correlation(first, second, "linear"),
        spearman=correlation(first, second, "ranked"),
        top=len(shared) / top_k if len(pairs) > top_k else None,
        same_first=most_important(first) == most_important(second),
        players=len(pairs),
        sign_changes=sum(left * right < 0 for left, right in pairs),
        same_answer=one.response == other.response,
    )


def most_important(values: Sequence[float], count: int = 1) -> list[int]:
    """Return the positions of the values of largest size; of equal ones the first."""
    return sorted(range(len(values)), key=lambda position: -abs(values[position]))[:count]


def correlation(
    first: Sequence[float], second: Sequence[float], method: Literal["linear", "ranked"]
) -> float | None:
    """Return Pearson's or Spearman's correlation; None for fewer than two points or a constant side."""
    try:
        found = statistics.correlation(first, second, method=method)
    except statistics.StatisticsError:
        return None
    return max(-1.0, min(1.0, found))
