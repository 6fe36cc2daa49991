"""The cost of each run, and its agreement with the exact run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.storage import Storage
from mllm_shapx.reporting.agreement import AgainstExact, AgreementSummary, AgreementTally, mean, summary
from mllm_shapx.reporting.pieces import prompt_pieces, rank_of
from mllm_shapx.reporting.reading import RunFiles, StudyFiles
from mllm_shapx.reporting.study_figures import StudyRows

AGAINST_EXACT = "against_exact"
"""Key of a run's summary."""


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
    exact: str | None
    """The exact run whose values it estimates; None for an exact run, and where there is none."""
    agreement: AgreementSummary
    """With that run, on all rows."""
    marked_first: float | None
    """Share of the marked rows whose marked word has the largest value."""
    deletion_area: float | None = None
    """Area under the deletion curve, mean over rows (docs/formats.md, `faithfulness`)."""
    insertion_area: float | None = None
    random_area: float | None = None
    share_sure: float | None = None
    """Share of the samples that reached the standard error of `stop_when`; None without it."""


def compare_runs(study: StudyFiles, marks: Mapping[int, Mark] | None = None) -> list[RunFigures]:
    """Return the figures of every run, exact ones first."""
    marks = marks or {}
    against = AgainstExact(study)
    firsts: list[list[float]] = [[] for _ in study.runs]
    rows = study.rows if any(against.exact) else [row for row in study.rows if row in marks]
    samples_of = StudyRows(study)
    for row in rows:
        samples = samples_of.read(row)
        against.add(samples)
        if row not in marks:
            continue
        for first, sample in zip(firsts, samples, strict=True):
            if sample is not None:
                rank = rank_of(marks[row].word, prompt_pieces(sample))
                first.append(rank is not None and rank[0] == 1)
    return [
        _figures(run, exact, tally, first)
        for run, exact, tally, first in zip(study.runs, against.exact, against.tallies, firsts, strict=True)
    ]


def _figures(
    run: RunFiles, exact: RunFiles | None, tally: AgreementTally, first: Sequence[float]
) -> RunFigures:
    recorded = run.summary
    samples = recorded.get("n_samples") or 0
    calls, model_calls = recorded.get("n_calls_total"), recorded.get("model_calls_total")
    return RunFigures(
        name=run.name,
        samples=len(run.sample_rows),
        failed=len(run.records.quarantined_rows()),
        mean_n_calls=calls / samples if calls is not None and samples else None,
        model_calls=None if model_calls is None else int(model_calls),
        seconds_per_sample=recorded.get("runtime_sec_avg") if samples else None,
        exact=None if exact is None else exact.name,
        agreement=summary(tally),
        marked_first=mean(first),
        deletion_area=recorded.get("deletion_area_mean"),
        insertion_area=recorded.get("insertion_area_mean"),
        random_area=recorded.get("random_area_mean"),
        share_sure=run.share_sure,
    )


def evenly(rows: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the rows, evenly spread, the first one included."""
    if len(rows) <= most:
        return list(rows)
    return [rows[position * len(rows) // most] for position in range(most)]


def left_out_notes(figures: Sequence[RunFigures]) -> list[str]:
    """Return a line for each reason for which rows of a run are not compared with its exact run."""
    return [
        f"{run.name}: {said} (against {run.exact}; `verify` says more)"
        for run in figures
        for said in run.agreement.left_out_in_words(run.exact or "")
    ]


def against_exact(storage: Storage, run_names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Return each run's errors against the exact run of the study, for its summary (docs/formats.md).

    None for an exact run, and for one whose values no exact run of the study has. The samples of the other
    runs are read again, one row at a time.
    """
    study = StudyFiles(storage, tuple(RunFiles(RunReader(storage, name)) for name in run_names))
    exact_of = dict(zip(run_names, AgainstExact(study).exact, strict=True))
    concerned = {name for run, exact in exact_of.items() if exact is not None for name in (run, exact.name)}
    compared = StudyFiles(storage, tuple(run for run in study.runs if run.name in concerned))
    against = AgainstExact(compared)
    for _, samples in StudyRows(compared):
        against.add(samples)
    tallies = {run.name: tally for run, tally in zip(compared.runs, against.tallies, strict=True)}
    return {
        name: None if exact is None else _errors(exact.name, summary(tallies[name]))
        for name, exact in exact_of.items()
    }


def _errors(exact: str, found: AgreementSummary) -> dict[str, Any]:
    return {
        "run": exact,
        "n_samples": found.rows,
        "n_left_out": found.left_out,
        "mean_absolute_error": found.difference,
        "mean_squared_error": found.squared_difference,
        "spearman": found.spearman,
        "sign_changes": found.sign_changes,
        "top_1": found.same_first,
        "top_3": found.top,
    }
