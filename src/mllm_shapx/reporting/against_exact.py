"""How far each run of a study is from the exact values, for its summary."""

from collections.abc import Sequence
from typing import Any

from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.storage import Storage
from mllm_shapx.reporting.agreement import Agreement, compare_samples
from mllm_shapx.reporting.reading import RunFiles, StudyFiles
from mllm_shapx.reporting.study_figures import StudyRows, mean

AGAINST_EXACT = "against_exact"
"""Key of the summary."""


def against_exact(storage: Storage, run_names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Return run -> its errors against the exact run of the study (docs/formats.md, the summary).

    None for an exact run, and for one whose values no exact run of the study has. The samples are read again,
    one row at a time; only runs that can be compared are.
    """
    study = StudyFiles(storage, tuple(RunFiles(RunReader(storage, name)) for name in run_names))
    exact_of = {run.name: study.exact_run_for(run) for run in study.runs}
    pairs = {name: exact.name for name, exact in exact_of.items() if exact is not None and exact.name != name}
    concerned = {*pairs, *pairs.values()}
    runs = tuple(run for run in study.runs if run.name in concerned)
    agreements: dict[str, list[Agreement]] = {name: [] for name in pairs}
    left_out = dict.fromkeys(pairs, 0)
    for _, samples in StudyRows(StudyFiles(storage, runs)):
        by_run = {run.name: sample for run, sample in zip(runs, samples, strict=True)}
        for name, exact in pairs.items():
            one, other = by_run[name], by_run[exact]
            if one is None:
                continue
            found = None if other is None else compare_samples(one, other)
            if isinstance(found, Agreement):
                agreements[name].append(found)
            else:
                left_out[name] += 1
    return {
        name: _figures(pairs[name], agreements[name], left_out[name]) if name in pairs else None
        for name in run_names
    }


def _figures(exact: str, found: Sequence[Agreement], left_out: int) -> dict[str, Any]:
    return {
        "run": exact,
        "n_samples": len(found),
        "n_left_out": left_out,
        "mean_absolute_error": mean([each.error for each in found]),
        "mean_squared_error": mean([each.squared_error for each in found]),
        "spearman": mean([each.spearman for each in found]),
        "top_1": mean([float(each.same_first) for each in found]),
        "top_3": mean([each.top for each in found]),
    }
