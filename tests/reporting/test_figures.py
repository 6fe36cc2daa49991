"""`report --figures`: plots as SVG and PDF, the errors as CSV and LaTeX."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from results_on_disk import make_sample, write_study
from small_study import untouched

from mllm_shapx.cli import main
from mllm_shapx.reporting.charts import PAPER, charts
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.reporting.study_figures import study_figures

RUNS = {
    "exact": 0.0,
    "limited_mc_ns10_seed0": 0.4,
    "limited_mc_ns10_seed1": 0.4,
    "limited_mc_ns-1_seed0": 0.1,
    "limited_mc_ns90_se0_05": 0.1,
    "my_ns7_hier_mc_k2_imp0_1_frac0_3": 0.2,
    "of_an_earlier_version_ns12": 0.3,
}
MC = {"explainer_type": "limited_mc", "name": None}
GAME = {"k": 2, "inner_type": "limited_mc", "first_layer_type": "limited_mc", "importance_min_fraction": 0.1}
SPECS: dict[str, Any] = {
    "limited_mc_ns10_seed0": {"variant": MC, "result_settings": {"seed": 0}},
    "limited_mc_ns10_seed1": {"variant": MC, "result_settings": {"seed": 1}},
    "limited_mc_ns-1_seed0": {"variant": MC, "result_settings": {"seed": 0}},
    "limited_mc_ns90_se0_05": {
        "variant": MC,
        "result_settings": {"stop_when": {"standard_error": 0.05}},
    },
    "my_ns7_hier_mc_k2_imp0_1_frac0_3": {
        "explainer_type": "hierarchical",
        "variant": {"explainer_type": "hierarchical", "name": "my_ns7"},
        "result_settings": {"hierarchical": GAME},
    },
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("figures") / "study", range(20), runs=RUNS, specs=SPECS)


def errors(run: str) -> list[float]:
    return [
        float(
            np.mean(
                np.abs(
                    np.array(make_sample(run, row, noise=RUNS[run]).player_values(), float)
                    - np.array(make_sample("exact", row).player_values(), float)
                )
            )
        )
        for row in range(20)
    ]


def test_files_for_a_paper_are_written_and_nothing_else(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    with untouched(study):
        told = CliRunner().invoke(main, ["report", str(study), "--figures", str(folder)])
    assert told.exit_code == 0, told.output
    plots = ("error_against_budget", "costs", "distribution_of_values", "position_of_largest")
    names = {f"{name}.{form}" for name in plots for form in ("svg", "pdf")} | {"errors.csv", "errors.tex"}
    assert {path.name for path in folder.iterdir()} == names
    assert set(told.output.split()) == {str(folder / name) for name in names}
    for name in plots:
        assert ET.fromstring((folder / f"{name}.svg").read_text()).tag.endswith("svg")  # noqa: S314 -- ours
        assert "var(" not in (folder / f"{name}.svg").read_text()
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    drawn = (folder / "error_against_budget.svg").read_text()
    assert all(
        word in drawn for word in ("limited_mc", "my_ns7_hier_limited_mc_k2_imp0.1", "coalitions evaluated")
    )


def test_errors_are_means_over_rows_and_seeds(study: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["report", str(study), "--figures", str(tmp_path)]).exit_code == 0
    table = pd.read_csv(tmp_path / "errors.csv").set_index("group")
    assert set(table.index) == {
        "limited_mc_ns10",
        "limited_mc_ns-1",
        "limited_mc_ns90_se0_05",
        "my_ns7_hier_mc_k2_imp0_1_frac0_3",
        "of_an_earlier_version_ns12",
    }
    both = errors("limited_mc_ns10_seed0") + errors("limited_mc_ns10_seed1")
    row = table.loc["limited_mc_ns10"]
    assert (row["seeds"], row["rows"], row["n_calls"], row["estimator"]) == (2, 40, 40, "limited_mc")
    assert row["error"] == pytest.approx(np.mean(both))
    assert row["error_sd"] == pytest.approx(np.std(both, ddof=1))
    assert [row["error_low"], row["error_high"]] == pytest.approx(list(np.quantile(both, [0.25, 0.75])))
    # The spec says which budgets are of one estimator. Without its word a run stands alone.
    assert list(table.loc[["limited_mc_ns-1", *table.index[-3:]], "estimator"]) == [
        "limited_mc",
        "limited_mc, stop_when",
        "my_ns7_hier_limited_mc_k2_imp0.1",
        "of_an_earlier_version_ns12",
    ]
    latex = (tmp_path / "errors.tex").read_text()
    assert r"\toprule" in latex
    assert f"limited\\_mc\\_ns10 & 40 & 40.000 & {np.mean(both):.3f} &" in latex


def test_the_place_of_the_largest_value_is_spread_over_the_tenths_it_covers(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", range(30), runs={"exact": 0.0}, players=4)
    figures = study_figures(open_study(str(study)))
    expected = np.zeros(10)
    for row in range(30):
        values = np.abs(np.array(make_sample("exact", row, players=4).player_values(), float))
        covered = {0: [1, 1, 0.5], 1: [0, 0, 0.5, 1, 1], 2: [0] * 5 + [1, 1, 0.5], 3: [0] * 7 + [0.5, 1, 1]}
        part = covered[int(values.argmax())]
        expected[: len(part)] += np.array(part) / 2.5
    assert figures.runs[0].positions == pytest.approx(list(expected))


def test_runs_stand_in_the_order_of_their_budgets(tmp_path: Path) -> None:
    runs = {"a_ns128": 0.1, "a_ns16": 0.1, "exact": 0.0, "b_frac0_3": 0.1}
    made = charts(study_figures(open_study(str(write_study(tmp_path / "study", [0], runs=runs)))), PAPER)
    values = next(chart for chart in made if chart.name == "distribution_of_values")
    assert values.spec["encoding"]["y"]["sort"] == ["exact", "a_ns16", "a_ns128", "b_frac0_3"]


def test_without_an_exact_run_there_are_plots_and_no_errors(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", range(3), runs={"limited_mc_ns10": 0.1})
    told = CliRunner().invoke(main, ["report", str(study), "--figures", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names == {"costs", "distribution_of_values", "position_of_largest"}


def test_what_cannot_be_written_is_refused_in_words(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = CliRunner().invoke(main, ["report", str(study), "--figures", str(study / "figures")])
    assert (inside.exit_code, "left as it is" in inside.output) == (2, True)
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    missing = CliRunner().invoke(main, ["report", str(study), "--figures", str(tmp_path / "out")])
    assert (missing.exit_code, "pip install 'mllm-shapx[plots]'" in missing.output) == (2, True)
    assert not (tmp_path / "out").exists()
