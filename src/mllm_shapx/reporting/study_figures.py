"""A study in figures for tables and plots: costs, errors against the exact run, distributions of values."""

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.agreement import Agreement, Obstacle, compare_samples, most_important
from mllm_shapx.reporting.reading import StudyFiles

BINS = 10
"""Bins of the relative position of the largest value."""

_SEED = re.compile(r"_seed\d+$")
_BUDGET = re.compile(r"_(fl)?(ns\d+|frac\d+(_\d+)?|lin\d+(_\d+)?)(?=_|$)")

MOST_VALUES = 200_000
"""Values per run that the distribution is computed from: those of the first rows."""


@dataclass
class RunSeries:
    """What the plots need of one run."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Runtime of each sample."""
    n_calls: list[int] = field(default_factory=list)
    model_calls: list[int] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    """Share of the absolute values that is on text, of each sample in which values are not all 0."""
    audio: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    positions: list[float] = field(default_factory=lambda: [0.0] * BINS)
    """Samples whose value of largest size is in each tenth of the prompt; a player that is in several tenths
    counts in each by its share of it."""
    agreements: list[Agreement] = field(default_factory=list)
    """With the exact run, of each row that can be compared."""
    obstacles: Counter[Obstacle] = field(default_factory=Counter)
    """Rows that cannot be compared with the exact run, by reason."""

    @property
    def group(self) -> str:
        """The run's name without its seed."""
        return _SEED.sub("", self.name)

    @property
    def estimator(self) -> str:
        """The run's name without seed and budget."""
        return _BUDGET.sub("", self.group)

    def add(self, sample: SampleResult, compared: Agreement | Obstacle | None) -> None:
        """Add one sample, and what a comparison with the exact run's gave."""
        self.seconds.append(sample.runtime_sec)
        self.n_calls.append(sample.n_calls)
        self.model_calls.append(sample.model_calls)
        summary = sample.attr_summary
        if math.isfinite(summary.frac_text) and summary.frac_text + summary.frac_audio > 0.0:
            self.text.append(summary.frac_text)
            self.audio.append(summary.frac_audio)
        values = [value for value in sample.player_values() if value is not None]
        if len(self.values) < MOST_VALUES:
            self.values += values
        if any(values):
            for place, share in _tenths(most_important(values)[0], len(values)):
                self.positions[place] += share
        if isinstance(compared, Agreement):
            self.agreements.append(compared)
        elif compared is not None:
            self.obstacles[compared] += 1


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One estimator with one budget against the exact values, over all rows and seeds."""

    group: str
    estimator: str
    seeds: int
    rows: int
    """Samples that were compared, of all seeds."""
    n_calls: float
    """Mean number of coalitions evaluated."""
    error: float
    """Mean over samples of `Agreement.error`."""
    error_sd: float | None
    error_low: float
    """First quartile over samples."""
    error_high: float
    """Third quartile over samples."""
    pearson: float | None
    spearman: float | None
    top: float | None
    same_first: float
    """Share of samples with the exact run's most important player."""
    sign_changes: float
    """Share of players whose sign differs from the exact value's."""


class StudyFigures:
    """The series of all runs, fed with one row after the other."""

    def __init__(self, study: StudyFiles, names: Sequence[str] | None = None) -> None:
        """Begin without rows; `names` are what the runs are called, their own names when None."""
        called = names or [run.name for run in study.runs]
        self.runs = [RunSeries(name) for name in called]
        exact = [study.exact_run_for(run) for run in study.runs]
        self._exact = [
            None if other is None or other is run else study.runs.index(other)
            for run, other in zip(study.runs, exact, strict=True)
        ]

    def add(self, samples: Sequence[SampleResult | None]) -> None:
        """Add one row: a sample per run, None where there is none."""
        for run, sample, exact in zip(self.runs, samples, self._exact, strict=True):
            if sample is None:
                continue
            reference = None if exact is None else samples[exact]
            run.add(sample, None if reference is None else compare_samples(sample, reference))

    def errors(self) -> list[ErrorRow]:
        """Return the errors of every estimator and budget, seeds together, by name and cost."""
        groups: dict[str, list[RunSeries]] = defaultdict(list)
        for run in self.runs:
            if run.agreements:
                groups[run.group].append(run)
        found = [_error_row(group, runs) for group, runs in groups.items()]
        return sorted(found, key=lambda row: (row.estimator, row.n_calls, row.group))


class StudyRows:
    """Every row of a study with each run's sample of it, and a count of the samples that cannot be read."""

    def __init__(self, study: StudyFiles) -> None:
        self._study = study
        self._rows = [frozenset(run.sample_rows) for run in study.runs]
        self.unreadable = [0] * len(study.runs)
        """Samples of each run that are damaged, among the rows that were read."""

    def __iter__(self) -> Iterator[tuple[int, list[SampleResult | None]]]:
        """Yield each row's index and its samples, None where a run has none."""
        for row in self._study.rows:
            yield row, self.read(row)

    def read(self, row: int) -> list[SampleResult | None]:
        """Return a row's samples, None where a run has none."""
        samples: list[SampleResult | None] = []
        for position, run in enumerate(self._study.runs):
            sample = run.sample(row) if row in self._rows[position] else None
            self.unreadable[position] += sample is None and row in self._rows[position]
            samples.append(sample)
        return samples

    def notes(self, names: Sequence[str]) -> list[str]:
        """Return a sentence for each run of which samples cannot be read."""
        return [
            f"{name}: {count:,} sample(s) cannot be read and are left out; `verify` names them."
            for name, count in zip(names, self.unreadable, strict=True)
            if count
        ]


def study_figures(study: StudyFiles) -> StudyFigures:
    """Return the figures of a whole study."""
    figures = StudyFigures(study)
    for _, samples in StudyRows(study):
        figures.add(samples)
    return figures


def _tenths(position: int, players: int) -> Iterator[tuple[int, float]]:
    """Yield the tenths of a prompt that a player is in, and which share of the player is in each."""
    start, end = position / players * BINS, (position + 1) / players * BINS
    for place in range(int(start), min(BINS, math.ceil(end))):
        yield place, (min(end, place + 1) - max(start, place)) / (end - start)


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the values below which the given shares lie, interpolated; NaN for no values."""
    ordered = sorted(values)
    if not ordered:
        return [math.nan] * len(shares)
    places = [share * (len(ordered) - 1) for share in shares]
    return [
        ordered[int(place)]
        + (place % 1) * (ordered[min(int(place) + 1, len(ordered) - 1)] - ordered[int(place)])
        for place in places
    ]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are there, None for none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _error_row(group: str, runs: Sequence[RunSeries]) -> ErrorRow:
    agreements = [agreement for run in runs for agreement in run.agreements]
    errors = [agreement.error for agreement in agreements]
    low, high = quantiles(errors, (0.25, 0.75))
    return ErrorRow(
        group=group,
        estimator=runs[0].estimator,
        seeds=len(runs),
        rows=len(errors),
        n_calls=mean([calls for run in runs for calls in run.n_calls]) or 0.0,
        error=mean(errors) or 0.0,
        error_sd=statistics.stdev(errors) if len(errors) > 1 else None,
        error_low=low,
        error_high=high,
        pearson=mean([agreement.pearson for agreement in agreements]),
        spearman=mean([agreement.spearman for agreement in agreements]),
        top=mean([agreement.top for agreement in agreements]),
        same_first=mean([float(agreement.same_first) for agreement in agreements]) or 0.0,
        sign_changes=sum(each.sign_changes for each in agreements) / sum(each.players for each in agreements),
    )
