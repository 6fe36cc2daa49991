"""The error of each run against the exact one, in the summary, in `compare` and in the report alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_study import Study

from mllm_shapx.cli import main
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.against_exact import against_exact
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.reporting.study_figures import study_figures

ROWS = 3
VARIANTS: list[dict[str, Any]] = [
    {"explainer_type": "exact_banzhaf"},
    {"explainer_type": "limited_mc", "num_samples": [14]},
    {"explainer_type": "kernel_banzhaf", "num_samples": [14]},
]
EXACT: dict[str, Any] = {"explainer_type": "exact"}


def summary_of(study: Study, run: str) -> Any:
    return json.loads((study.output / run / "summary" / "aggregate_metrics.json").read_text())


def values_of(study: Study, run: str, row: int) -> list[float]:
    sample = json.loads((study.output / run / "samples" / f"sample_{row:05d}_result.json").read_text())
    return [
        value
        for turn in sample["conversation"]
        for entry in turn
        for value in entry["shap_values"] or ()
        if value is not None
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study to which the exact run is added once the others are finished."""
    study = Study(tmp_path_factory.mktemp("late"), rows=ROWS, words=5, settings={"experiments": VARIANTS})
    assert study.call("--inline").code == 0
    assert summary_of(study, "limited_mc_ns14")["against_exact"] is None
    assert summary_of(study, "kernel_banzhaf_ns14")["against_exact"]["run"] == "exact_banzhaf"
    study.write_config(experiments=[*VARIANTS, EXACT])
    assert study.call("--inline", "--resume").code == 0
    return study


def test_an_exact_run_that_comes_later_is_compared_with(study: Study) -> None:
    found = summary_of(study, "limited_mc_ns14")["against_exact"]
    assert (found["run"], found["n_samples"], found["n_left_out"]) == ("exact", ROWS, 0)
    gaps = [
        [
            one - true
            for one, true in zip(
                values_of(study, "limited_mc_ns14", row), values_of(study, "exact", row), strict=True
            )
        ]
        for row in range(ROWS)
    ]
    assert found["mean_absolute_error"] == pytest.approx(
        sum(sum(map(abs, row)) / len(row) for row in gaps) / ROWS
    )
    assert found["mean_squared_error"] == pytest.approx(
        sum(sum(gap**2 for gap in row) / len(row) for row in gaps) / ROWS
    )
    assert summary_of(study, "exact")["against_exact"] is None


def test_banzhaf_values_are_compared_with_exact_banzhaf_values_alone(study: Study) -> None:
    assert summary_of(study, "kernel_banzhaf_ns14")["against_exact"]["run"] == "exact_banzhaf"
    assert summary_of(study, "exact_banzhaf")["against_exact"] is None


def test_summary_compare_and_report_say_the_same(study: Study) -> None:
    found = summary_of(study, "limited_mc_ns14")["against_exact"]
    names = [str(study.output / name) for name in ("exact", "limited_mc_ns14")]
    called = CliRunner().invoke(main, ["compare", "--json", *names])
    assert called.exit_code == 0, called.output
    (pair,) = json.loads(called.stdout)["pairs"]
    assert pair["difference"] == pytest.approx(found["mean_absolute_error"])
    assert pair["squared_difference"] == pytest.approx(found["mean_squared_error"])
    assert (pair["spearman"], pair["same_first"], pair["top"]) == (
        found["spearman"],
        found["top_1"],
        found["top_3"],
    )
    rows = {row.group: row for row in study_figures(open_study(str(study.output))).errors()}
    assert rows["limited_mc_ns14"].error == pytest.approx(found["mean_absolute_error"])


def test_rows_without_an_exact_sample_are_counted(study: Study, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "study"
    shutil.copytree(study.output, copied)
    (copied / "exact" / "samples" / "sample_00000_result.json").unlink()
    found = against_exact(open_storage(str(copied)), ["limited_mc_ns14", "exact"])
    assert found["limited_mc_ns14"] is not None
    assert (found["limited_mc_ns14"]["n_samples"], found["limited_mc_ns14"]["n_left_out"]) == (ROWS - 1, 1)
    assert found["exact"] is None


def test_the_report_says_how_sure_each_value_is(study: Study, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    called = CliRunner().invoke(main, ["report", str(study.output), "--output", str(page)])
    assert called.exit_code == 0, called.output
    sample = json.loads((study.output / "limited_mc_ns14/samples/sample_00000_result.json").read_text())
    text = page.read_text()
    listed = json.dumps(sample["standard_errors"], separators=(",", ":"))
    assert f'"e":{listed}' in text.replace(" ", "")
    assert "(standard error)" in text
