"""What each run cost and how close its values are to the exact ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.agreement import Obstacle, compare_samples
from mllm_shapx.reporting.pieces import prompt_pieces, rank_of
from mllm_shapx.reporting.reading import RunFiles, StudyFiles

MOST_COMPARED = 1000
"""Rows per run whose values are compared; of more, as many evenly spread ones are taken."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A word of a row's prompt that is known to matter."""

    column: str
    """The dataset's column that holds it."""
    word: str


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run in figures; None where its files do not say, or nothing can be compared."""

    name: str
    samples: int
    failed: int
    mean_n_calls: float | None
    """Coalitions that the run evaluated per sample."""
    model_calls: int | None
    """Answers generated for the run because no other run had them."""
    seconds_per_sample: float | None
    correlation: float | None
    """Pearson correlation of a row's values with the exact run's, mean over rows; None for an exact run."""
    marked_first: float | None
    """Share of the marked rows whose marked word has the largest value."""
    deletion_area: float | None = None
    """Area under the deletion curve, mean over rows (docs/formats.md, `faithfulness`)."""
    insertion_area: float | None = None
    random_area: float | None = None
    not_compared: int = 0
    """Rows that the exact run explained from other content or players; the correlation leaves them out."""


def compare_runs(study: StudyFiles, marks: Mapping[int, Mark] | None = None) -> list[RunFigures]:
    """Return the figures of every run, exact ones first."""
    return [_figures(study, run, marks or {}) for run in study.runs]


def evenly(rows: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the rows, evenly spread, the first one included."""
    if len(rows) <= most:
        return list(rows)
    return [rows[position * len(rows) // most] for position in range(most)]


def mixing_notes(figures: Sequence[RunFigures]) -> list[str]:
    """Return a line for each run of which rows are left out of the comparison."""
    return [
        f"{run.name}: {run.not_compared} row(s) are not compared: the exact run explained other prompts "
        "or players there (`verify` says more)"
        for run in figures
        if run.not_compared
    ]


def _figures(study: StudyFiles, run: RunFiles, marks: Mapping[int, Mark]) -> RunFigures:
    summary = run.summary
    samples = summary.get("n_samples") or 0
    calls, model_calls = summary.get("n_calls_total"), summary.get("model_calls_total")
    correlation, marked_first, not_compared = _compared(study, run, marks)
    return RunFigures(
        name=run.name,
        samples=len(run.sample_rows),
        failed=len(run.records.quarantined_rows()),
        mean_n_calls=calls / samples if calls is not None and samples else None,
        model_calls=None if model_calls is None else int(model_calls),
        seconds_per_sample=summary.get("runtime_sec_avg") if samples else None,
        correlation=correlation,
        marked_first=marked_first,
        deletion_area=summary.get("deletion_area_mean"),
        insertion_area=summary.get("insertion_area_mean"),
        random_area=summary.get("random_area_mean"),
        not_compared=not_compared,
    )


def _compared(
    study: StudyFiles, run: RunFiles, marks: Mapping[int, Mark]
) -> tuple[float | None, float | None, int]:
    exact = study.exact_run_for(run)
    reference = None if exact is run else exact
    correlations: list[float] = []
    firsts: list[bool] = []
    not_compared = 0
    for row, sample in _some_samples(run, wanted=None if reference is not None else marks):
        if reference is not None and (other := reference.sample(row)) is not None:
            found = compare_samples(sample, other)
            if isinstance(found, Obstacle):
                not_compared += 1
            elif found.pearson is not None:
                correlations.append(found.pearson)
        if row in marks:
            rank = rank_of(marks[row].word, prompt_pieces(sample))
            firsts.append(rank is not None and rank[0] == 1)
    return _mean(correlations), _mean([float(first) for first in firsts]), not_compared


def _some_samples(run: RunFiles, wanted: Mapping[int, Mark] | None) -> Iterator[tuple[int, SampleResult]]:
    rows = [row for row in run.sample_rows if wanted is None or row in wanted]
    for row in evenly(rows, MOST_COMPARED):
        sample = run.sample(row)
        if sample is not None:
            yield row, sample


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
