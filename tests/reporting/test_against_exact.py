"""The error of each run against the exact one, in the summary, in `compare` and in the report alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import data_of
from click.testing import CliRunner
from results_on_disk import make_sample, write_study
from small_study import Study

from mllm_shapx.cli import main
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.agreement import Obstacle
from mllm_shapx.reporting.compare import compare
from mllm_shapx.reporting.comparison import against_exact, compare_runs
from mllm_shapx.reporting.html import report
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.reporting.study_figures import study_figures
from mllm_shapx.reporting.table import results_table

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


def three_views(directory: Path, run: str, page: Path) -> list[dict[str, Any]]:
    """Return what summary, `compare` and report say of a run against the exact one."""
    summed = against_exact(open_storage(str(directory)), [run, "exact"])[run]
    assert summed is not None
    names = [str(directory / "exact"), str(directory / run)]
    called = CliRunner().invoke(main, ["compare", "--json", *names])
    assert called.exit_code == 0, called.output
    (pair,) = json.loads(called.stdout)["pairs"]
    assert CliRunner().invoke(main, ["report", str(directory), "--output", str(page)]).exit_code == 0
    shown = next(each for each in data_of(page.read_text())["runs"] if each["name"] == run)
    keys = {"top_1": "same_first", "top_3": "top", "mean_absolute_error": "difference"}
    keys |= {"error": "difference", "correlation": "pearson", "mean_squared_error": "squared_difference"}
    return [
        {keys.get(key, key): value for key, value in view.items() if keys.get(key, key) in pair}
        for view in (summed, pair, shown)
    ]


def test_summary_compare_report_and_table_say_the_same(study: Study, tmp_path: Path) -> None:
    summed, pair, shown = three_views(study.output, "limited_mc_ns14", tmp_path / "page.html")
    figures = {"spearman", "top", "same_first", "sign_changes", "difference"}
    assert figures <= summed.keys() & shown.keys()
    assert summed == {key: pair[key] for key in summed}
    assert shown == {key: pair[key] for key in shown}
    rows = {row.group: row for row in study_figures(open_study(str(study.output))).errors()}
    assert rows["limited_mc_ns14"].found.difference == summed["difference"]
    table = {run.name: run.agreement for run in compare_runs(open_study(str(study.output)))}
    assert table["limited_mc_ns14"].pearson == pair["pearson"] == shown["pearson"]


def test_rows_that_are_not_compared_are_counted_alike_everywhere(tmp_path: Path) -> None:
    """One row has another prompt, one other players, one no exact sample; page and table name each."""
    directory = write_study(tmp_path / "study", range(6), runs={"exact": 0.0, "mc": 0.1})
    records = RunRecords(open_storage(str(directory)), "mc")
    made = make_sample("mc", 0)
    records.write_sample(replace(made, prompt_texts=("something else",)))
    fewer = make_sample("mc", 1, players=5)
    records.write_sample(replace(fewer, prompt_texts=make_sample("mc", 1).prompt_texts))
    (directory / "exact" / "samples" / "sample_00002_result.json").unlink()
    (directory / "mc" / "samples" / "sample_00003_result.json").unlink()
    summed = against_exact(open_storage(str(directory)), ["mc", "exact"])["mc"]
    assert summed is not None
    assert (summed["n_samples"], summed["n_left_out"]) == (2, 3)
    (compared,) = compare([str(directory)]).pairs
    assert (compared.found.rows, compared.found.not_compared[Obstacle.ONLY_FIRST]) == (2, 1)
    assert compared.found.left_out == 4
    _, run = compare_runs(open_study(str(directory)))
    assert (run.agreement.rows, run.agreement.left_out) == (2, 3)
    reasons = [
        "mc: 1 row(s) are not compared: the runs explained other prompts there",
        "mc: 1 row(s) are not compared: the prompts are cut into other players",
        "mc: 1 row(s) are in this run alone",
    ]
    page = data_of(report(str(directory), tmp_path / "page.html").read_text())
    assert [note for note in page["notes"] if "row(s)" in note] == [f"{reason}." for reason in reasons]
    for text in (compare([str(directory)]).to_text(200), results_table(str(directory), width=200)):
        assert all(reason in text for reason in reasons)


def test_every_row_of_a_large_study_counts(tmp_path: Path) -> None:
    """The table's correlation is that of the page also where a study has more than a thousand rows."""
    directory = write_study(tmp_path / "study", range(1100), runs={"exact": 0.0, "mc": 0.1}, players=4)
    odd = replace(make_sample("mc", 1099, players=4), prompt_texts=("something else",))
    RunRecords(open_storage(str(directory)), "mc").write_sample(odd)
    _, run = compare_runs(open_study(str(directory)))
    assert (run.agreement.rows, run.agreement.left_out) == (1099, 1)
    (pair,) = compare([str(directory)]).pairs
    assert pair.found.pearson == run.agreement.pearson


def test_budgets_and_seeds_of_one_estimator_are_known_by_their_specs(tmp_path: Path) -> None:
    """Names such as ns-1 and frac1e-05 do not decide it, nor what a variant is called."""
    budgets = {"num_samples": [-1, 14], "fractions": [1e-05], "seeds": [3, 4]}
    variants = [
        EXACT,
        {"explainer_type": "limited_mc", **budgets},
        {"explainer_type": "limited_mc", "name": "my_ns5", "num_samples": [14]},
        {"explainer_type": "hierarchical", "hierarchical": {"ks": [2], "shap_num_samples": [-1, 8]}},
    ]
    made = Study(tmp_path, rows=2, words=5, settings={"experiments": variants})
    called = made.call("--inline")
    assert called.code == 0, called.out
    rows = study_figures(open_study(str(made.output))).errors()
    found = {(row.group, row.seeds): row.estimator for row in rows}
    assert found == {
        ("limited_mc_ns-1", 2): "limited_mc",
        ("limited_mc_ns14", 2): "limited_mc",
        ("limited_mc_frac1e-05", 2): "limited_mc",
        ("my_ns5_limited_mc_ns14", 1): "my_ns5_limited_mc",
        ("hier_limited_mc_k2_imp0_1_ns-1", 1): "hier_limited_mc_k2_imp0.1",
        ("hier_limited_mc_k2_imp0_1_ns8", 1): "hier_limited_mc_k2_imp0.1",
    }


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
