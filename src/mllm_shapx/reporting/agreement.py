"""How far two runs agree, on a row and over all: errors, correlations, the most important players, signs."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.changed_rows import same_content
from mllm_shapx.reporting.pieces import prompt_pieces
from mllm_shapx.reporting.reading import StudyFiles

TOP_K = 3
"""Players that count as the most important ones, by the size of their values."""


class Obstacle(Enum):
    """Why two runs are not compared on a row."""

    OTHER_PROMPT = "other prompts"
    OTHER_PLAYERS = "other players"
    ONLY_FIRST = "only the first run has it"
    ONLY_SECOND = "only the second run has it"


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
    """Two runs over all rows: means over the rows that were compared, None where none has the figure."""

    rows: int
    """Rows that were compared."""
    spearman: float | None
    pearson: float | None
    top: float | None
    """Share of the k most important players that both have; over rows of more than k players."""
    same_first: float | None
    """Share of rows with the same most important player."""
    sign_changes: float | None
    """Share of players with a positive value in one run and a negative one in the other."""
    difference: float | None
    """Mean over players of |difference of the values|."""
    squared_difference: float | None
    """Mean over players of the squared difference."""
    same_answer: float | None
    """Share of rows with the same answer to the whole prompt."""
    other_prompts: int
    """Rows that are not compared: they were made from other content."""
    other_players: int
    """Rows that are not compared: the prompt is cut into other players."""
    only_first: int
    """Rows that only the first run has."""
    only_second: int

    @property
    def left_out(self) -> int:
        """Rows that are not compared."""
        return self.other_prompts + self.other_players + self.only_first + self.only_second

    def left_out_in_words(self, first: str) -> list[str]:
        """Return how many rows are not compared, for each reason; `first` is the first run's name."""
        counts = {
            "are not compared: the runs explained other prompts there": self.other_prompts,
            "are not compared: the prompts are cut into other players": self.other_players,
            f"are in {first} alone": self.only_first,
            "are in this run alone": self.only_second,
        }
        return [f"{count:,} row(s) {why}" for why, count in counts.items() if count]


@dataclass
class AgreementTally:
    """What the comparison of two runs finds, row by row."""

    top_k: int = TOP_K
    agreements: list[Agreement] = field(default_factory=list)
    left_out: Counter[Obstacle] = field(default_factory=Counter)
    """Rows that are not compared, by reason."""

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
        found = [study.exact_run_for(run) for run in study.runs]
        self.exact = [
            None if other is None or other is run else other
            for run, other in zip(study.runs, found, strict=True)
        ]
        """For each run its exact run; None for an exact run, and where there is none."""
        self.tallies = [AgreementTally() for _ in study.runs]
        """For each run what was found; the exact run is the first of the two."""
        self._places = [None if other is None else study.runs.index(other) for other in self.exact]

    def add(self, samples: Sequence[SampleResult | None]) -> None:
        """Add one row: a sample for each run, None where it has none."""
        for sample, place, tally in zip(samples, self._places, self.tallies, strict=True):
            if sample is not None and place is not None:
                tally.add(samples[place], sample)


def summary(*tallies: AgreementTally) -> AgreementSummary:
    """Return the figures over all rows of some comparisons."""
    found = [agreement for tally in tallies for agreement in tally.agreements]
    left_out = sum((tally.left_out for tally in tallies), Counter[Obstacle]())
    players = sum(each.players for each in found)
    return AgreementSummary(
        rows=len(found),
        spearman=mean([each.spearman for each in found]),
        pearson=mean([each.pearson for each in found]),
        top=mean([each.top for each in found]),
        same_first=mean([float(each.same_first) for each in found]),
        sign_changes=sum(each.sign_changes for each in found) / players if players else None,
        difference=mean([each.difference for each in found]),
        squared_difference=mean([each.squared_difference for each in found]),
        same_answer=mean([float(each.same_answer) for each in found]),
        other_prompts=left_out[Obstacle.OTHER_PROMPT],
        other_players=left_out[Obstacle.OTHER_PLAYERS],
        only_first=left_out[Obstacle.ONLY_FIRST],
        only_second=left_out[Obstacle.ONLY_SECOND],
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are there, None for none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


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
        difference=math.fsum(abs(left - right) for left, right in pairs) / len(pairs),
        squared_difference=math.fsum((left - right) ** 2 for left, right in pairs) / len(pairs),
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
