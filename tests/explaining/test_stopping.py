"""`stop_when`: sampling ends once the values are sure enough, as a run with that budget would have ended."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import data_of
from check_coverage import SAMPLING, coverage, play, smooth
from click.testing import CliRunner
from explaining_kit import WORDS, Generator, explain, row_of, runs_of
from small_study import Study, results

from mllm_shapx.cli import main
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.planning.plan import make_plan
from mllm_shapx.planning.runs import Budget, RunSpec, flat_coalitions, rounds
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.html import report
from mllm_shapx.reporting.table import results_table

GROWING = [name for name, facts in EXPLAINERS.items() if facts.grows]
PLAYERS = 9
PROMPT = " ".join(WORDS[:PLAYERS])


def run_of(standard_error: float, **keys: Any) -> RunSpec:
    (run,) = runs_of({"num_samples": 400, "stop_when": {"standard_error": standard_error}, **keys})
    return run


def with_budget(run: RunSpec, budget: int) -> RunSpec:
    """Return the same run with a fixed budget; draws depend on its name, which stays."""
    return replace(run, budget=Budget("num_samples", budget), stop_when=None)


def bare(sample: SampleResult) -> SampleResult:
    """Return the sample without its seconds, and without why it stopped."""
    return replace(sample, runtime_sec=0.0, stopped=None)


@pytest.mark.parametrize("explainer", SAMPLING)
def test_only_of_these_explainers_does_a_larger_budget_begin_with_a_smaller_one(explainer: str) -> None:
    """The others would ask for more than their budget; how much more stands in docs/formats.md."""
    game = smooth(8, np.random.default_rng(0))
    begins = []
    for seed, budget in ((1, 32), (2, 50), (3, 76), (4, 120), (5, 180)):
        few = play(game, explainer, Budget("num_samples", budget), seed).masks
        many = play(game, explainer, Budget("num_samples", budget + budget // 2), seed).masks
        begins.append(many[: len(few)] == few)
    assert all(begins) == (explainer in GROWING)


@pytest.mark.parametrize("explainer", GROWING)
def test_the_sample_is_that_of_the_budget_at_which_it_stopped(explainer: str) -> None:
    row = row_of(PROMPT)
    run = run_of(0.04, explainer_type=explainer)
    generator = Generator()
    sample = explain(row, run, generator=generator)
    assert sample.stopped == "standard_error"
    assert sample.standard_errors is not None
    assert max(sample.standard_errors) <= 0.04
    assert len(generator.asked) == len(set(generator.asked)) == sample.n_calls == sample.model_calls < 400
    plain = explain(row, with_budget(run, sample.n_calls))
    assert bare(sample) == bare(plain)
    budgets = [flat_coalitions(explainer, each, PLAYERS) for each in rounds(explainer, run.budget, PLAYERS)]
    assert sample.n_calls in budgets[1:]
    before = explain(row, with_budget(run, budgets[budgets.index(sample.n_calls) - 1]))
    assert before.standard_errors is not None
    assert not max(before.standard_errors) <= 0.04, "it stops at the first round that is sure"


def test_a_budget_that_is_spent_gives_the_sample_of_the_plain_run() -> None:
    run = run_of(1e-6, num_samples=None, fraction=0.37)
    sample = explain(row_of(PROMPT), run)
    assert sample.stopped == "budget"
    plain = explain(row_of(PROMPT), replace(run, stop_when=None))
    assert bare(sample) == bare(plain)
    assert (plain.stopped, "stopped" in plain.to_json()) == (None, False)


@pytest.mark.parametrize("players", [1, 2, 3])
def test_where_all_coalitions_fit_nothing_is_unsure(players: int) -> None:
    sample = explain(row_of(" ".join(WORDS[:players])), run_of(1e-6))
    assert (sample.stopped, sample.n_calls) == ("standard_error", 1 << players)


def test_curves_come_after_the_values_and_are_counted() -> None:
    plain, generator = run_of(0.04), Generator()
    run = replace(plain, faithfulness=run_of(1, faithfulness={"random": 2}).faithfulness)
    sample, without = explain(row_of(PROMPT), run, generator=generator), explain(row_of(PROMPT), plain)
    assert sample.raw_values == without.raw_values
    assert sample.stopped == "standard_error"
    assert without.n_calls < sample.n_calls == len(generator.asked) == len(set(generator.asked))


def test_beside_other_runs_it_asks_for_what_is_not_stored_alone() -> None:
    row, run, generator = row_of(PROMPT), run_of(0.04), Generator()
    (exact,) = runs_of({"explainer_type": "exact"})
    shared = open_row(row, run)
    explain(row, exact, shared, generator)
    sample = explain(row, run, shared, generator)
    assert (len(generator.asked), sample.model_calls) == (1 << PLAYERS, 0)
    assert sample.raw_values == explain(row, run).raw_values


@pytest.mark.parametrize("explainer", GROWING)
def test_standard_errors_still_cover_where_they_decided_to_stop(explainer: str) -> None:
    """`scripts/check_coverage.py --stop-when 0.1` prints the table of 1,000 trials."""
    found = coverage(explainer, "smooth", players=7, budget=120, trials=60, stop_when=0.15)
    assert found.known == 1.0
    assert found.coalitions < 115
    assert 0.88 <= found.within <= 0.99
    assert 0.8 < found.ratio < 1.3


def test_rounds_grow_by_half_from_four_coalitions_per_player_to_the_budget() -> None:
    budget = Budget("linear", 2.0)
    found = [flat_coalitions("limited_cc", each, 10) for each in rounds("limited_cc", budget, 10)]
    assert found == [40, 60, 90, 136, 200]
    assert list(rounds("limited_mc", Budget("num_samples", -1), 10)) == [Budget("num_samples", -1)]
    assert list(rounds("limited_mc", Budget("fraction", 1.0), 2)) == [Budget("fraction", 1.0)]


def test_name_settings_and_plan_of_such_a_run() -> None:
    variant = {"num_samples": [20, 400], "stop_when": {"standard_error": 0.05}, "seeds": [3]}
    data = {
        "experiment_set_id": "study",
        "generation": {"text_temperature": 0},
        "experiments": [variant, {"num_samples": 400}],
    }
    runs = expand(ExperimentSet.model_validate(data)).runs
    assert [run.name for run in runs] == [
        "limited_mc_ns20_se0_05_seed3",
        "limited_mc_ns400_se0_05_seed3",
        "limited_mc_ns400",
    ]
    stop = {"standard_error": 0.05}
    assert [run.result_settings.get("stop_when") for run in runs] == [stop, stop, None]
    again = expand(ExperimentSet.model_validate({**data, "experiments": [run.variant for run in runs]})).runs
    assert [run.result_settings for run in again] == [run.result_settings for run in runs]
    plan = make_plan("study", runs[1:2], (0,), {0: 12})
    assert "at most 400" in plan.to_text()
    assert any("stop_when" in note for note in plan.notes)
    assert plan.to_json()["runs"][0]["stop_when"] == stop
    assert (plan.totals()["coalitions"], plan.totals()["model_calls_are_an_estimate"]) == (400, True)
    whole = make_plan("study", runs[1:2], (0,), {0: 6})
    assert whole.totals()["model_calls_are_an_estimate"] is True, "64 coalitions are the most, not the number"


def test_a_study_resumes_and_rescores_such_a_run(tmp_path: Path) -> None:
    settings = {
        "experiments": [
            {"num_samples": 60, "stop_when": {"standard_error": error}, "faithfulness": {"random": 1}}
            for error in (0.1, 1e-6)
        ]
    }
    study = Study(tmp_path, settings=settings)
    study.write_prompts(
        "please help my teacher explain the harbor", "kindly help my baker explain the harbor", "the harbor"
    )
    assert study.call("--inline").code == 0
    finished = results(study.output)
    why = [
        [finished[f"{name}/samples/sample_0000{row}_result.json"]["stopped"] for row in range(3)]
        for name in ("limited_mc_ns60_se0_1", "limited_mc_ns60_se1e-06")
    ]
    assert why == [["standard_error"] * 3, ["budget", "budget", "standard_error"]]
    sure = [finished[path]["n_sure"] for path in sorted(finished) if "summary" in path]
    assert sure == [3, 1]
    assert study.call(verb="verify").code == 0
    table = results_table(str(study.output), width=200)
    assert re.findall(r"^(limited_mc_\S+) +3 +[\d.]+ +(\d+%)", table, re.MULTILINE) == [
        ("limited_mc_ns60_se0_1", "100%"),
        ("limited_mc_ns60_se1e-06", "33%"),
    ]
    page = data_of(report(str(study.output), tmp_path / "page.html").read_text())
    sure_at = [(run["stop_at"], run["sure"]) for run in page["runs"]]
    assert sure_at == [(0.1, 1.0), (1e-6, pytest.approx(1 / 3))]
    assert [[run["t"] for run in row["r"]] for row in page["rows"]] == [[1, 0], [1, 0], [1, 1]]
    assert any("stop_when" in note for note in page["notes"])
    for path in study.output.glob("*/samples/*.json"):
        path.unlink()
    from_stored = study.call("--inline", "--resume")
    assert "no model is loaded" in from_stored.out
    assert results(study.output) == finished
    for path in [*study.output.glob("*/samples/*.json"), *study.output.glob("generations/00001*.parquet")]:
        path.unlink()
    assert study.call("--inline", "--resume").code == 0
    assert results(study.output) == finished
    assert CliRunner().invoke(main, ["rescore", "--config", str(study.config), "--overwrite"]).exit_code == 0
    assert results(study.output) == finished
