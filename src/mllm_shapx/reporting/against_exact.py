"""How far each run of a study is from the exact values, for its summary."""

from collections.abc import Sequence
from typing import Any

from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.storage import Storage
from mllm_shapx.reporting.agreement import AgainstExact, AgreementSummary, summary
from mllm_shapx.reporting.reading import RunFiles, StudyFiles
from mllm_shapx.reporting.study_figures import StudyRows

AGAINST_EXACT = "against_exact"
"""Key of the summary."""


def against_exact(storage: Storage, run_names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Return run -> its errors against the exact run of the study (docs/formats.md, the summary).

    None for an exact run, and for one whose values no exact run of the study has. The samples are read again,
    one row at a time; only runs that can be compared are.
    """
    study = StudyFiles(storage, tuple(RunFiles(RunReader(storage, name)) for name in run_names))
    exact_of = dict(zip(run_names, AgainstExact(study).exact, strict=True))
    concerned = {name for run, exact in exact_of.items() if exact is not None for name in (run, exact.name)}
    compared = StudyFiles(storage, tuple(run for run in study.runs if run.name in concerned))
    found = AgainstExact(compared)
    for _, samples in StudyRows(compared):
        found.add(samples)
    tallies = {run.name: tally for run, tally in zip(compared.runs, found.tallies, strict=True)}
    return {
        name: None if exact is None else _figures(exact.name, summary(tallies[name]))
        for name, exact in exact_of.items()
    }


def _figures(exact: str, found: AgreementSummary) -> dict[str, Any]:
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
