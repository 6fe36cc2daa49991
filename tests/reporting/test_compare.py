"""`compare`: runs of one set or several, row by row, and what cannot be compared."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browser import chromium, in_browser, opened
from click.testing import CliRunner, Result
from older_directories import write_older_directory
from results_on_disk import make_sample, text_entry, write_study
from safetensors.torch import load_file, save_file
from small_study import MODEL, Study

from mllm_shapx.cli import main
from mllm_shapx.records.results import USER, SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.agreement import Agreement, Obstacle, compare_samples


def call(*args: str) -> Result:
    found = CliRunner().invoke(main, list(args))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def compared(*args: str) -> Any:
    found = call("compare", "--json", *args)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def sample(pieces: Sequence[str], values: Sequence[float | None], **more: Any) -> SampleResult:
    turns = ((text_entry(USER, pieces, values),),)
    players = sum(value is not None for value in values)
    return replace(
        make_sample("run", 0),
        conversation=turns,
        prompt_texts=("".join(pieces),),
        num_players=players,
        **more,
    )


def write(directory: Path, run: str, row: int, made: SampleResult) -> None:
    RunRecords(open_storage(str(directory)), run).write_sample(replace(made, run_name=run, row_index=row))


def rank_correlation(one: Any, other: Any) -> float:
    return float(np.corrcoef(pd.Series(one).rank(), pd.Series(other).rank())[0, 1])


WORDS = ["a", " b", " c", " d", " e"]


def test_agreement_of_two_samples_by_hand() -> None:
    one = sample(WORDS, [0.5, -0.2, 0.1, 0.0, 0.05])
    other = sample(WORDS, [0.4, 0.3, 0.1, -0.1, -0.05], response="another answer")
    found = compare_samples(one, other, top_k=2)
    assert isinstance(found, Agreement)
    assert found.difference == pytest.approx((0.1 + 0.5 + 0.0 + 0.1 + 0.1) / 5)
    assert (found.top, found.same_first, found.players, found.same_answer) == (1.0, True, 5, False)
    # b and e change their sign; d is 0 in one of them.
    assert found.sign_changes == 2
    first, second = [0.5, -0.2, 0.1, 0.0, 0.05], [0.4, 0.3, 0.1, -0.1, -0.05]
    assert found.spearman == pytest.approx(rank_correlation(first, second))
    assert found.pearson == pytest.approx(np.corrcoef(first, second)[0, 1])
    three = compare_samples(one, other, top_k=3)
    assert isinstance(three, Agreement)
    assert three.top == pytest.approx(1.0)
    five = compare_samples(one, other, top_k=5)
    assert isinstance(five, Agreement)
    assert five.top is None


def test_constant_values_have_no_correlation_and_one_player_is_enough() -> None:
    found = compare_samples(sample(["a"], [1.0]), sample(["a"], [1.0]))
    assert isinstance(found, Agreement)
    assert (found.difference, found.pearson, found.spearman, found.top, found.same_first) == (
        0.0,
        None,
        None,
        None,
        True,
    )


def test_other_prompts_and_other_players_are_told_apart() -> None:
    one = sample(WORDS, [0.1] * 5)
    assert compare_samples(one, sample(["x", *WORDS[1:]], [0.1] * 5)) is Obstacle.OTHER_PROMPT
    assert compare_samples(one, sample(["a b", " c", " d", " e"], [0.1] * 4)) is Obstacle.OTHER_PLAYERS
    assert compare_samples(one, sample(WORDS, [0.1] * 4 + [None])) is Obstacle.OTHER_PLAYERS
    first, second = (replace(one, row_digest=digest * 32) for digest in "ab")
    assert compare_samples(first, second) is Obstacle.OTHER_PROMPT


def test_runs_of_two_sets_are_compared_on_the_rows_they_share(tmp_path: Path) -> None:
    first = write_study(tmp_path / "phi", range(6), runs={"exact": 0.0})
    second = write_study(tmp_path / "smol", range(2, 9), runs={"exact": 0.0})
    # Row 3 has another prompt, row 4 other players, row 5 cannot be read.
    made = make_sample("exact", 3)
    write(second, "exact", 3, replace(made, prompt_texts=("something else",)))
    write(
        second,
        "exact",
        4,
        replace(sample(WORDS, [0.1] * 5), prompt_texts=make_sample("exact", 4).prompt_texts),
    )
    (second / "exact" / "samples" / "sample_00005_result.json").write_text("{")
    found = compared(str(first / "exact"), str(second / "exact"))
    assert [run["name"] for run in found["runs"]] == ["phi/exact", "smol/exact"]
    assert [(run["samples"], run["unreadable"]) for run in found["runs"]] == [(6, 0), (6, 1)]
    (pair,) = found["pairs"]
    assert (pair["rows"], pair["other_prompts"], pair["other_players"]) == (1, 1, 1)
    assert (pair["only_first"], pair["only_second"]) == (3, 3)
    assert (pair["spearman"], pair["pearson"], pair["top"], pair["difference"]) == (1.0, 1.0, 1.0, 0.0)
    text = call("compare", str(first / "exact"), str(second / "exact")).output
    for said in (
        "smol/exact: 1 row(s) are not compared: the runs explained other prompts there",
        "smol/exact: 1 row(s) are not compared: the prompts are cut into other players",
        "smol/exact: 3 row(s) are in phi/exact alone",
        "smol/exact: 3 row(s) are in this run alone",
        "smol/exact: 1 sample(s) cannot be read and are left out",
    ):
        assert said in text


def test_a_set_stands_for_its_runs_and_settings_that_differ_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", range(8))
    spec = study / "standard_cc_ns32" / "spec.json"
    data = json.loads(spec.read_text())
    data["result_settings"]["shap"] = {"similarity": "CosineSimilarity"}
    spec.write_text(json.dumps(data))
    found = compared(str(study), str(study / "exact"))
    assert [pair["second"] for pair in found["pairs"]] == ["limited_mc_frac0_3", "standard_cc_ns32"]
    assert [pair["settings"] for pair in found["pairs"]] == [[], ["shap.similarity"]]
    assert found["runs"][0]["n_calls"] == 256
    assert found["runs"][1]["model_calls"] == 0
    values = [
        [np.array(make_sample(run, row, noise=noise).player_values(), float) for row in range(8)]
        for run, noise in (("exact", 0.0), ("limited_mc_frac0_3", 0.1))
    ]
    pair = found["pairs"][0]
    signs = [np.mean(one * other < 0) for one, other in zip(*values, strict=True)]
    ranks = [rank_correlation(one, other) for one, other in zip(*values, strict=True)]
    assert pair["sign_changes"] == pytest.approx(np.mean(signs))
    assert pair["spearman"] == pytest.approx(np.mean(ranks))
    tops = [
        len({*np.argsort(-abs(one))[:3].tolist()} & {*np.argsort(-abs(other))[:3].tolist()}) / 3
        for one, other in zip(*values, strict=True)
    ]
    assert pair["top"] == pytest.approx(np.mean(tops))


def test_the_older_runner_s_runs_are_compared_with_ours(tmp_path: Path) -> None:
    older = write_older_directory(tmp_path / "older", {"connector": "hf_text"})
    found = compared(str(older))
    assert [run["model_calls"] for run in found["runs"]] == [None, None]
    assert found["pairs"][0]["rows"] == 2
    # By numpy.corrcoef over both rows.
    assert found["pairs"][0]["pearson"] == pytest.approx(0.990, abs=5e-4)


def test_calls_that_compare_nothing_are_refused(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", range(2), runs={"exact": 0.0})
    alone = call("compare", str(study))
    assert alone.exit_code == 2
    assert "needs two runs or more" in alone.output
    inside = call(
        "compare", str(study), str(write_study(tmp_path / "b", [0])), "--html", str(study / "page.html")
    )
    assert inside.exit_code == 2
    assert "left as it is" in inside.output


@pytest.mark.slow
def test_two_models_are_compared_by_what_they_answer(tmp_path: Path) -> None:
    """The demo's model against one of other weights: the figures are those of numpy and pandas."""
    import mllm_shapx

    other = tmp_path / "other-model"
    shutil.copytree(MODEL, other)
    noise = torch.Generator().manual_seed(0)
    weights = {
        name: weight + 2.0 * weight.std() * torch.randn(weight.shape, generator=noise)
        for name, weight in load_file(other / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for name, model in (("one", MODEL), ("two", other)):
        settings = {
            "connector_kwargs": {"model_id": str(model), "dtype": "float32"},
            "experiments": [{"explainer_type": "exact"}],
        }
        study = Study(tmp_path / name, rows=4, words=5, settings=settings)
        assert study.call("--inline").code == 0
        found[name] = str(study.output / "exact")
    (pair,) = compared(*found.values())["pairs"]
    assert (pair["rows"], pair["other_prompts"], pair["other_players"], pair["only_first"]) == (4, 0, 0, 0)
    assert "model_commit" in pair["settings"]
    loaded = [mllm_shapx.load(directory) for directory in found.values()]
    columns = [each.values().set_index(["row", "position"])["value"] for each in loaded]
    values = pd.concat(columns, axis=1, keys=["one", "two"])
    gaps = (values["one"] - values["two"]).abs().groupby("row").mean()
    assert pair["difference"] == pytest.approx(gaps.mean())
    assert pair["difference"] > 0.0
    ranks = [rank_correlation(row["one"], row["two"]) for _, row in values.groupby("row") if row.std().all()]
    assert pair["spearman"] == (pytest.approx(np.mean(ranks)) if ranks else None)
    assert pair["sign_changes"] == pytest.approx((values["one"] * values["two"] < 0).mean())
    answers = [[sample.response for sample in each.samples()] for each in loaded]
    same = [one == two for one, two in zip(*answers, strict=True)]
    assert pair["same_answer"] == np.mean(same) < 1.0


@in_browser
@pytest.mark.slow
def test_the_page_shows_runs_side_by_side_with_their_agreement(tmp_path: Path) -> None:
    first = write_study(tmp_path / "phi", range(4), runs={"exact": 0.0})
    second = write_study(tmp_path / "smol", range(5), runs={"exact": 0.0, "limited_mc_ns10": 0.2})
    page = tmp_path / "page.html"
    told = call("compare", str(first), str(second), "--html", str(page))
    assert told.exit_code == 0, told.output
    found = compared(str(first), str(second))["pairs"]
    with chromium() as browser, opened(browser, page, width=400) as view:
        cells = view.locator("#pairs tbody tr").nth(1).locator("td").all_inner_texts()
        assert cells[:3] == ["phi/exact ↔ smol/limited_mc_ns10", "4", f"{found[1]['spearman']:.3f}"]
        assert cells[-1] == "1"
        names = ["phi/exact", "smol/exact", "smol/limited_mc_ns10"]
        assert view.locator("article[data-row='0'] .panel .head b").all_text_contents() == names
        assert view.locator("article[data-row='4'] .panel").count() == 2
        assert "1 row(s) are in this run alone" in view.locator("#notes").inner_text()
        view.get_by_role("button", name="rank correlation").first.click()
        assert view.evaluate("document.documentElement.scrollWidth") == 400
