"""`verify` calls a sound directory sound, and names the file of everything that is not."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records_kit import files_below, make_finished_run, make_sample

from mllm_shapx.errors import UsageError
from mllm_shapx.records.answer import Answer
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.measures import Areas, Faithfulness, Interactions
from mllm_shapx.records.results import AttributionSummary, SampleResult, Stopped
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.spec import selected_rows
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.records.store import CoalitionStore, StoreHeader
from mllm_shapx.records.summary import RunSummary
from mllm_shapx.reporting.verify import verify

ROWS = [4, 2, 9, 7]


def _edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_a_sound_directory_is_sound_from_the_sets_folder_and_from_the_runs_and_is_not_touched(
    tmp_path: Path,
) -> None:
    for name in ("exact", "limited_mc_ns8"):
        make_finished_run(tmp_path / "set", ROWS, name)
    CoalitionStore(LocalStorage(tmp_path / "set")).merge(4, "aa", StoreHeader({}), {1: Answer("x")})
    before = files_below(tmp_path)
    report = verify([str(tmp_path / "set")])
    assert report.problems == []
    assert report.ok
    assert [(run.planned, run.completed, run.failed) for run in report.runs] == [(4, 4, 0)] * 2
    assert report.text() == "2 run(s), 8 sample(s), 0 quarantined row(s): all sound"
    single = verify([str(tmp_path / "set" / "exact"), str(tmp_path / "set" / "limited_mc_ns8")])
    assert single.ok
    assert len(single.runs) == 2
    assert files_below(tmp_path) == before


def test_summaries_and_samples_of_earlier_versions_are_sound_without_the_constant_rows(
    tmp_path: Path,
) -> None:
    records = make_finished_run(tmp_path, ROWS)
    _edit_json(tmp_path / records.layout.summary, lambda data: data.pop("n_constant"))
    report = verify([str(tmp_path)])
    assert report.ok, report.text()
    assert report.warnings == [], "samples that do not say how many answers they saw are not judged"


def test_a_wrong_number_of_constant_rows_is_a_problem(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    _edit_json(tmp_path / records.layout.summary, lambda data: data.update(n_constant=2))
    (problem,) = verify([str(tmp_path)]).problems
    assert "n_constant" in problem.message


def test_quarantined_rows_are_accounted_for(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    rows = [*ROWS, 11]
    records.write_failure(FailureRecord(11, "exact", "no_players", "nothing to explain", 1, quarantined=True))
    summary = RunSummary()
    inspection = records.inspect(rows, summary.add)
    summary.add_failure()
    records.checkpoint_writer(rows, inspection).write()
    records.write_summary(summary.to_json())
    records.write_spec({**(records.read_spec() or {}), "selected_rows": selected_rows(rows)})
    report = verify([str(tmp_path)])
    assert report.problems == []
    assert report.runs[0].failed == 1


def _write_sample(path: Path, sample: SampleResult) -> None:
    RunRecords(LocalStorage(path.parents[2]), "exact").write_sample(sample)


def _write(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    return write


def _make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _set_summary(**changes: Any) -> Callable[[Path], None]:
    return lambda path: _edit_json(path, lambda data: data.update(changes))


WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a sample cut short": (
        "samples/sample_00009_result.json",
        _write(b'{"row_index": '),
        "it is not JSON",
    ),
    "a sample of another row": (
        "samples/sample_00009_result.json",
        lambda path: _edit_json(path, lambda data: data.update(row_index=2)),
        "it holds row 2",
    ),
    "a sample of another schema": (
        "samples/sample_00009_result.json",
        lambda path: _edit_json(path, lambda data: data.pop("n_calls")),
        "it lacks the field n_calls",
    ),
    "a sample that is a folder": (
        "samples/sample_00009_result.json",
        _make_a_folder,
        "cannot be read",
    ),
    "values that do not add up": (
        "samples/sample_00009_result.json",
        lambda path: _write_sample(path, make_sample(9, values_sum=0.5, grand_value=0.7)),
        "the values sum to 0.5, not to v(all) - v(none) = 0.6",
    ),
    "values that are not normalized": (
        "samples/sample_00009_result.json",
        lambda path: _edit_json(
            path, lambda data: data["conversation"][1][0].update(shap_values=[0.5, 0.5, 0.5])
        ),
        "the absolute values sum to 1.5, not to 1",
    ),
    "shares that do not fit the values": (
        "samples/sample_00009_result.json",
        lambda path: _write_sample(
            path, make_sample(9, attr_summary=AttributionSummary(0.5, 0.0, 0.5, 0.0, 3, 0))
        ),
        "attr_summary's sums give 0.5, the values 1",
    ),
    "a player without a value": (
        "samples/sample_00009_result.json",
        lambda path: _write_sample(path, make_sample(9, num_players=4)),
        "it has 3 values for 4 players",
    ),
    "raw values that do not add up": (
        "samples/sample_00009_result.json",
        lambda path: _edit_json(path, lambda data: data.update(raw_values=[0.5, 0.5, 0.5])),
        "raw_values sum to 1.5, values_sum says",
    ),
    "a player without a raw value": (
        "samples/sample_00009_result.json",
        lambda path: _edit_json(path, lambda data: data.update(raw_values=[0.5])),
        "it has 1 raw_values for 3 players",
    ),
    "a checkpoint that is gone": ("checkpoint.json", Path.unlink, "it is missing"),
    "a checkpoint cut short": ("checkpoint.json", _write(b"{"), "not JSON"),
    "a checkpoint of another version": (
        "checkpoint.json",
        lambda path: _edit_json(path, lambda data: data.update(version=1)),
        "its version is 1, not 2",
    ),
    "a checkpoint that names a sample that is not there": (
        "checkpoint.json",
        lambda path: _edit_json(path, lambda data: data["completed_indices"].append(30)),
        "1 row(s) named as completed have no readable sample: row 30",
    ),
    "a checkpoint that lacks a sample": (
        "checkpoint.json",
        lambda path: _edit_json(path, lambda data: data["completed_indices"].remove(9)),
        "1 sample(s) are not named: row 9",
    ),
    "a checkpoint that names a row twice": (
        "checkpoint.json",
        lambda path: _edit_json(path, lambda data: data["completed_indices"].append(9)),
        "more than once",
    ),
    "a checkpoint that stands elsewhere": (
        "checkpoint.json",
        lambda path: _edit_json(path, lambda data: data.update(next_index=2)),
        "next_index is 2, though all of 4 rows are completed",
    ),
    "a summary that is gone": ("summary/aggregate_metrics.json", Path.unlink, "it is missing"),
    "a summary that counts wrong": (
        "summary/aggregate_metrics.json",
        _set_summary(n_samples=3, avg_frac_text=0.9),
        "differs from what the samples give: n_samples, avg_frac_text",
    ),
    "a summary of wrong languages": (
        "summary/aggregate_metrics.json",
        lambda path: _edit_json(path, lambda data: data["by_language"][0].update(n_calls_total=1)),
        "by_language[0].n_calls_total",
    ),
    "a spec that is gone": ("spec.json", Path.unlink, "counts cannot be held against the plan"),
    "a spec cut short": ("spec.json", _write(b""), "it is empty"),
    "a spec of more rows": (
        "spec.json",
        lambda path: _edit_json(path, lambda data: data.update(selected_rows=selected_rows(range(10)))),
        "",
    ),
    "a failure that is damaged": (
        "failures/sample_00004.json",
        _write(b"{"),
        "it is damaged",
    ),
    "a leftover temporary file": (
        "samples/.tmp-0123",
        _write(b"{"),
        "left over from a write",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, what: str) -> None:
    make_finished_run(tmp_path, ROWS)
    name, break_it, words = WRONG[what]
    path = tmp_path / "exact" / name
    break_it(path)
    report = verify([str(tmp_path)])
    assert not report.ok
    mine = [problem for problem in report.problems if problem.file == str(path)]
    assert words == "" or any(words in problem.message for problem in mine), report.text()
    assert str(report.problems[0]) in report.text()
    json.dumps(report.to_json())


def test_rows_that_are_missing_from_the_plan_are_counted_and_named(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    records.write_spec({**(records.read_spec() or {}), "selected_rows": selected_rows([*ROWS, 20, 21])})
    messages = [problem.message for problem in verify([str(tmp_path)]).problems]
    assert messages[0] == "2 planned row(s) have neither a sample nor a failure: row 20, 21"


def test_a_row_with_a_sample_and_a_failure_is_told(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, ROWS)
    records.write_failure(FailureRecord(4, "exact", "worker_died", "killed", 3, quarantined=True))
    (problem,) = verify([str(tmp_path)]).problems
    assert problem.message == "the row has a sample as well"


@pytest.mark.parametrize(
    ("normalizer", "values", "is_sound"),
    [
        ("IdentityNormalizer", (0.5, -0.25, 0.125), True),
        ("IdentityNormalizer", (0.5, -0.25, 0.5), False),
        ("AbsSumNormalizer", (0.0, 0.0, 0.0), True),
        ("MinMaxNormalizer", (0.75, 0.0, 0.25), True),
        ("MinMaxNormalizer", (0.75, 0.0, 0.75), False),
        ("PowerShiftNormalizer", (0.9, 0.0, 0.1), True),
        ("PowerShiftNormalizer", (1.2, -0.3, 0.1), False),
        ("PowerShiftNormalizer", (0.2, 0.2, 0.2), True),
    ],
)
def test_values_are_held_against_the_normalizer_of_the_spec(
    tmp_path: Path, normalizer: str, values: tuple[float, ...], is_sound: bool
) -> None:
    records = make_finished_run(tmp_path, [0])
    spec = records.read_spec() or {}
    spec["result_settings"]["shap"]["normalizer"] = normalizer
    records.write_spec(spec)
    sample = make_sample(0)
    total = sum(abs(value) for value in values)
    entry = dataclasses.replace(sample.conversation[1][0], shap_values=values)
    records.write_sample(
        dataclasses.replace(
            sample,
            conversation=(sample.conversation[0], (entry,), sample.conversation[2]),
            attr_summary=AttributionSummary(total, 0.0, float(total > 0), 0.0, 3, 0),
        )
    )
    summary = RunSummary()
    records.inspect([0], summary.add)
    records.write_summary(summary.to_json())
    assert verify([str(tmp_path)]).ok is is_sound


def test_sampling_runs_need_not_be_efficient(tmp_path: Path) -> None:
    records = make_finished_run(tmp_path, [0], "limited_mc_ns8")
    spec = records.read_spec() or {}
    spec["result_settings"]["explainer_type"] = "limited_mc"
    records.write_spec(spec)
    records.write_sample(make_sample(0, "limited_mc_ns8", grand_value=0.9))
    summary = RunSummary()
    records.inspect([0], summary.add)
    records.write_summary(summary.to_json())
    assert verify([str(tmp_path)]).ok


def test_a_damaged_store_file_is_named(tmp_path: Path) -> None:
    make_finished_run(tmp_path, ROWS)
    store = CoalitionStore(LocalStorage(tmp_path))
    store.merge(4, "aa", StoreHeader({}), {1: Answer("x")})
    store.append(2, "aa", StoreHeader({}), {1: Answer("x")})
    for path in (tmp_path / "generations").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1])
    files = [problem.file for problem in verify([str(tmp_path)]).problems]
    assert files == [
        str(tmp_path / "generations" / "00002-aa.parts" / "000001.parquet"),
        str(tmp_path / "generations" / "00004-aa.parquet"),
    ]
    assert "else remove it by hand" in verify([str(tmp_path)]).text()


def test_a_directory_that_is_being_written_is_checked_and_the_reader_is_told(tmp_path: Path) -> None:
    make_finished_run(tmp_path, ROWS)
    with OutputLock(LocalStorage(tmp_path)):
        report = verify([str(tmp_path)])
    assert report.ok
    assert "is being written by process" in report.text()


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no results"):
        verify([str(tmp_path)])


CURVE = (0.1, 0.2, 0.3, 0.475)
PAIRS = ((0,), (1,), (2,), (0, 1))
MEASURES = [
    (Faithfulness((0, 1, 2, 3), CURVE, CURVE, (CURVE,), Areas(0.2, 0.2, 0.2)), None, ""),
    (Faithfulness((0, 1, 2), CURVE, CURVE, (CURVE,), Areas(0.2, 0.2, 0.2)), None, "from 0 to 3 players"),
    (Faithfulness((0, 1, 2, 3), CURVE, CURVE, (CURVE[1:],), Areas(0.2, 0.2, 0.2)), None, "its 4 points"),
    (None, Interactions("k-SII", 2, PAIRS, (0.4, -0.35, 0.125, 0.2)), ""),
    (None, Interactions("SII", 2, PAIRS, (0.4, 0.4, 0.4, 0.4)), ""),
    (None, Interactions("k-SII", 2, PAIRS, (0.4, 0.4, 0.4, 0.4)), "the interactions sum to 1.6"),
    (None, Interactions("k-SII", 2, PAIRS, (0.4, 0.4)), "2 interactions for 4 sets"),
]


STOPS = [
    (0.05, "standard_error", (0.05, 0.0, 0.01), ""),
    (0.05, "budget", (0.051, 0.0, 0.01), ""),
    (0.05, "budget", (math.nan, 0.0, 0.01), ""),
    (0.05, "budget", None, ""),
    (None, None, (0.0, 0.0, 0.0), ""),
    (None, "budget", (0.1, 0.1, 0.1), "stopped is budget, though the run has no stop_when"),
    (0.05, "standard_error", (0.051, 0.0, 0.01), "stopped is standard_error, not budget: not every"),
    (0.05, "budget", (0.05, 0.0, 0.01), "stopped is budget, not standard_error: every standard error"),
    (0.05, None, (0.1, 0.1, 0.1), "stopped is absent, not budget: not every standard error is at most 0.05"),
]


@pytest.mark.parametrize(("stop_at", "stopped", "errors", "words"), STOPS)
def test_why_sampling_stopped_is_held_against_the_standard_errors(
    tmp_path: Path,
    stop_at: float | None,
    stopped: Stopped | None,
    errors: tuple[float, ...] | None,
    words: str,
) -> None:
    records = make_finished_run(tmp_path, [0])
    if stop_at is not None:
        stop_when = {"standard_error": stop_at}
        spec = records.read_spec() or {}
        spec["result_settings"]["stop_when"] = stop_when
        records.write_spec(spec)
    check_verdict(records, make_sample(0, standard_errors=errors, stopped=stopped), words)


@pytest.mark.parametrize(("faithfulness", "interactions", "words"), MEASURES)
def test_curves_and_interactions_are_held_against_what_they_are(
    tmp_path: Path, faithfulness: Faithfulness | None, interactions: Interactions | None, words: str
) -> None:
    records = make_finished_run(tmp_path, [0])
    check_verdict(records, make_sample(0, faithfulness=faithfulness, interactions=interactions), words)


def check_verdict(records: RunRecords, sample: SampleResult, words: str) -> None:
    """Write the only sample of a run; `verify` must find nothing, or say `words`."""
    records.write_sample(sample)
    summary = RunSummary()
    records.inspect([0], summary.add)
    records.write_summary(summary.to_json())
    report = verify([records.storage.uri])
    assert report.ok is (words == ""), report.text()
    assert words in report.text()
