"""A study in figures for tables and plots: costs, errors against the exact run, distributions of values."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.spec import explainer_type, result_settings
from mllm_shapx.reporting.agreement import (
    AgainstExact,
    AgreementSummary,
    AgreementTally,
    mean,
    most_important,
    summary,
)
from mllm_shapx.reporting.reading import RunFiles, StudyFiles

BINS = 10
"""Bins of the relative position of the largest value."""

MOST_VALUES = 200_000
"""Most values per run for the distribution: those of the first rows."""


@dataclass
class Costs:
    """The costs of one run's samples, one entry per sample."""

    n_calls: list[int] = field(default_factory=list)
    model_calls: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, sample: SampleResult) -> None:
        """Add one sample."""
        self.n_calls.append(sample.n_calls)
        self.model_calls.append(sample.model_calls)
        self.seconds.append(sample.runtime_sec)


@dataclass(kw_only=True)
class RunSeries(Costs):
    """The data of one run for the plots."""

    name: str
    group: str
    """The run's name without its seed."""
    estimator: str
    """The name that it shares with runs of other budgets and seeds."""
    tally: AgreementTally
    """The comparison with the exact run."""
    text: list[float] = field(default_factory=list)
    """Share of the absolute values that text has, for each sample with a value other than 0."""
    audio: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    positions: list[float] = field(default_factory=lambda: [0.0] * BINS)
    """Number of samples whose value of largest size is in each tenth of the prompt. A player in several
    tenths counts partly in each."""

    def add(self, sample: SampleResult) -> None:
        """Add one sample."""
        super().add(sample)
        shares = sample.attr_summary
        if math.isfinite(shares.frac_text) and shares.frac_text + shares.frac_audio > 0.0:
            self.text.append(shares.frac_text)
            self.audio.append(shares.frac_audio)
        values = [value for value in sample.player_values() if value is not None]
        if len(self.values) < MOST_VALUES:
            self.values += values
        if any(values):
            for place, share in _tenths(most_important(values)[0], len(values)):
                self.positions[place] += share


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One estimator with one budget against the exact values, over all rows and seeds."""

    group: str
    estimator: str
    seeds: int
    n_calls: float
    """Mean number of coalitions evaluated."""
    found: AgreementSummary
    """With the exact run, over the samples of all seeds."""
    error_sd: float | None
    """Standard deviation over samples of `Agreement.difference`."""
    error_low: float
    """First quartile over samples."""
    error_high: float
    """Third quartile over samples."""


class StudyFigures:
    """The series of all runs, to which rows are added one by one."""

    def __init__(self, study: StudyFiles, names: Sequence[str] | None = None) -> None:
        """Begin without rows; `names` are names for the runs, their own when None."""
        called = names or [run.name for run in study.runs]
        self._against = AgainstExact(study)
        self.runs = []
        for run, name, tally in zip(study.runs, called, self._against.tallies, strict=True):
            group, estimator = _group_and_estimator(run, name)
            self.runs.append(RunSeries(name=name, group=group, estimator=estimator, tally=tally))

    def add(self, samples: Sequence[SampleResult | None]) -> None:
        """Add one row: a sample per run, None where there is none."""
        self._against.add(samples)
        for run, sample in zip(self.runs, samples, strict=True):
            if sample is not None:
                run.add(sample)

    def errors(self) -> list[ErrorRow]:
        """Return the errors of every estimator and budget, seeds together, by name and cost."""
        groups: dict[str, list[RunSeries]] = defaultdict(list)
        for run in self.runs:
            if run.tally.agreements:
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
        for position, (run, rows) in enumerate(zip(self._study.runs, self._rows, strict=True)):
            samples.append(run.sample(row) if row in rows else None)
            self.unreadable[position] += row in rows and samples[-1] is None
        return samples


def unreadable_notes(counts: Mapping[str, int]) -> list[str]:
    """Return a line for each run with samples that cannot be read; `counts` has their numbers."""
    return [
        f"{name}: {count:,} sample(s) cannot be read and are left out; `verify` names them"
        for name, count in counts.items()
        if count
    ]


def study_figures(study: StudyFiles) -> StudyFigures:
    """Return the figures of a whole study."""
    figures = StudyFigures(study)
    for _, samples in StudyRows(study):
        figures.add(samples)
    return figures


def _tenths(position: int, players: int) -> Iterator[tuple[int, float]]:
    """Yield each tenth of a prompt that a player is in, with the share of the player there."""
    start, end = position / players * BINS, (position + 1) / players * BINS
    for place in range(int(start), min(BINS, math.ceil(end))):
        yield place, (min(end, place + 1) - max(start, place)) / (end - start)


def _error_row(group: str, runs: Sequence[RunSeries]) -> ErrorRow:
    errors = [agreement.difference for run in runs for agreement in run.tally.agreements]
    low, high = np.quantile(errors, (0.25, 0.75)).tolist()
    return ErrorRow(
        group=group,
        estimator=runs[0].estimator,
        seeds=len(runs),
        n_calls=mean([calls for run in runs for calls in run.n_calls]) or 0.0,
        found=summary(*(run.tally for run in runs)),
        error_sd=statistics.stdev(errors) if len(errors) > 1 else None,
        error_low=low,
        error_high=high,
    )


def _group_and_estimator(run: RunFiles, called: str) -> tuple[str, str]:
    """Return a run's name without its seed, and without its budget as well.

    The spec says what to leave out. A run without these entries in its spec is a group of its own.
    """
    spec = run.spec
    variant, settings = spec.get("variant"), result_settings(spec) or {}
    seed = settings.get("seed")
    group = called if seed is None else called.removesuffix(f"_seed{seed}")
    kind = explainer_type(spec)
    if kind is None or not isinstance(variant, dict):
        return group, group
    named = f"{variant['name']}_" if variant.get("name") else ""
    game = settings.get("hierarchical")
    if isinstance(game, dict):
        least = game.get("importance_min_fraction")
        kind = f"hier_{game.get('inner_type')}_k{game.get('k')}_imp{least}"
        if game.get("first_layer_type") != game.get("inner_type"):
            kind += f"_fl{game.get('first_layer_type')}"
    if run.stop_at is not None:
        kind += ", stop_when"  # it has no fixed budget, so it is not on the line of those
    # Names of runs of several sets begin with their place.
    return group, f"{called.removesuffix(run.name)}{named}{kind}"
