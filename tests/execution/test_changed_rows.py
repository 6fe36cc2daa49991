"""A dataset that is changed under a study: refused with the rows that differ, or done again if accepted."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import constants
from small_study import Study, results, untouched

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.execution.study_plan import study_plan

ROWS = 6
RUNS = 3
WORDS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("finished"), rows=ROWS, words=WORDS)
    assert study.call("--inline").code == 0
    return study


@pytest.fixture
def study(finished: Study, tmp_path: Path) -> Study:
    """A copy of the finished study with a dataset of its own, of the same content."""
    copy = Study(tmp_path, rows=ROWS, words=WORDS)
    shutil.copytree(finished.output, copy.output)
    for spec in copy.output.glob("*/spec.json"):
        written = spec.read_text().replace(str(finished.folder), str(copy.folder))
        spec.write_text(written)
    return copy


def prompts(study: Study) -> list[str]:
    found: list[str] = pq.read_table(study.folder / "rows.parquet").column("prompt").to_pylist()
    return found


def edit(study: Study, row: int = 2) -> None:
    """Change the text of one row."""
    texts = prompts(study)
    texts[row] = "please draw the harbor"
    study.write_prompts(*texts)


def files_of(study: Study, folder: str = "samples") -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(study.output)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in study.output.glob(f"*/{folder}/*.json")
    }


def test_an_edited_row_is_refused_by_every_command_that_would_mix_it(study: Study) -> None:
    edit(study)
    differs = "1 row(s) differ from what the samples were made from: row 2"
    with untouched(study.output):
        resumed = study.call("--inline", "--resume")
        assert resumed.code == 2
        assert differs in resumed.out
        assert f"{RUNS} sample(s) show the rows as they were" in resumed.out
        assert "--accept-changed-rows" in resumed.out
        rescored = CliRunner().invoke(main, ["rescore", "--config", str(study.config)])
        assert (rescored.exit_code, differs in rescored.output) == (2, True)
        verified = study.call(verb="verify")
        assert (verified.code, differs in verified.out) == (1, True)
        reported = study.call(verb="report")
        assert (reported.code, differs in reported.out) == (2, True)
    assert study.call("--accept-changed-rows", verb="report").code == 0


def test_retry_refuses_too(tmp_path: Path) -> None:
    study = Study(tmp_path, rows=1, settings={"experiments": [{"explainer_type": "exact"}]})
    study.write_prompts("please draw the harbor", "", "please tell us")
    assert study.call("--inline").code == 3
    study.write_prompts("please draw the ferry", "please sing", "please tell us")
    refused = study.call("--inline", verb="retry")
    assert refused.code == 2
    assert "1 row(s) differ from what the samples were made from: row 0" in refused.out
    study.write_prompts("please draw the harbor", "please sing", "please tell us")
    assert study.call("--inline", verb="retry").code == 0, "a row that failed may be mended"


def test_accepted_changes_are_done_again_and_nothing_else_is(study: Study, tmp_path: Path) -> None:
    before, old = files_of(study), results(study.output)
    edit(study)
    end = study.call("--inline", "--resume", "--accept-changed-rows")
    assert end.code == 0, end.out
    assert f"({2**WORDS} model calls" in end.out, "answers to the old row are not reused"
    after = files_of(study)
    assert {path for path in after if after[path] != before[path]} == {
        f"{run.name}/samples/sample_00002_result.json"
        for run in study.output.glob("*")
        if run.name in RUN_NAMES
    }
    kept = {
        path.name: json.loads(path.read_text()) for path in study.output.glob("exact/set_aside_*/samples/*")
    }
    assert list(kept) == ["sample_00002_result.json"]
    assert (
        kept["sample_00002_result.json"]["response"]
        == (old["exact/samples/sample_00002_result.json"]["response"])
    )
    assert list(study.output.glob("generations/set_aside/00002-*")), "old answers are kept too"
    verified = study.call(verb="verify")
    assert verified.code == 0, verified.out
    undisturbed = Study(tmp_path / "undisturbed", rows=ROWS)
    shutil.copy(study.folder / "rows.parquet", undisturbed.folder / "rows.parquet")
    assert undisturbed.call("--inline").code == 0
    assert results(study.output) == results(undisturbed.output)


def test_rows_with_more_words_and_rows_that_failed_are_done_again(tmp_path: Path) -> None:
    study = Study(tmp_path, rows=1, settings={"experiments": [{"explainer_type": "exact"}]})
    study.write_prompts("please draw the harbor", "", "please tell us")
    assert study.call("--inline").code == 3
    study.write_prompts("please draw", "please sing", "please tell us")
    refused = study.call("--inline", "--resume")
    assert refused.code == 2
    assert "1 row(s) differ from what the samples were made from: row 0" in refused.out
    accepted = study.call("--inline", "--resume", "--accept-changed-rows")
    assert accepted.code == 0, accepted.out
    assert "the dataset has changed since 1 row(s) failed; they are tried again" in accepted.out
    assert "(8 model calls" in accepted.out, "of two rows with two words each"
    assert study.call(verb="verify").code == 0


def test_a_row_that_failed_is_not_tried_again_for_nothing(tmp_path: Path) -> None:
    study = Study(tmp_path, rows=1, settings={"experiments": [{"explainer_type": "exact"}]})
    study.write_prompts("please draw", "")
    assert study.call("--inline").code == 3
    assert study.call("--inline", "--resume").code == 3
    study.write_prompts("please draw", "please sing")
    mended = study.call("--inline", "--resume")
    assert (mended.code, "(4 model calls" in mended.out) == (0, True), mended.out


RUN_NAMES = {"exact", "limited_mc_frac0_5", "standard_cc_ns16"}


MOVES: dict[str, tuple[Any, list[str]]] = {
    "inserted": (
        lambda texts: ["please draw the harbor", *texts],
        ["6 row(s) differ", "row 0-5 now stand at row 1-6: 1 row(s) were inserted above"],
    ),
    "removed": (
        lambda texts: texts[2:],
        [
            "6 row(s) differ",
            "row 2-5 now stand at row 0-3: 2 row(s) were removed above",
            "row 0-1 have another content or are gone",
        ],
    ),
    "reordered": (
        lambda texts: [texts[1], texts[0], *texts[2:4], texts[5], texts[4]],
        ["4 row(s) differ", "row 0-1, 4-5 now stand at other indices: the rows were reordered"],
    ),
    "cut": (lambda texts: texts[:4], ["2 row(s) differ from what the samples were made from: row 4-5"]),
}


@pytest.mark.parametrize("move", MOVES)
def test_rows_that_moved_are_recognized(study: Study, move: str) -> None:
    change, said = MOVES[move]
    study.write_prompts(*change(prompts(study)))
    end = study.call("--inline", "--resume")
    assert end.code == 2
    assert [part for part in said if part not in end.out] == [], end.out


def test_rows_at_the_end_are_welcome_and_the_commit_tells_the_versions_apart(study: Study) -> None:
    before, commit = files_of(study), spec(study)["dataset_commit"]
    assert commit.startswith("content:")
    study.write_prompts(*prompts(study), "please draw the harbor")
    end = study.call("--inline", "--resume")
    assert end.code == 0, end.out
    assert f"({2**WORDS} model calls" in end.out
    after = files_of(study)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + RUNS
    assert spec(study)["dataset_commit"] not in {commit, None}
    assert spec(study)["result_settings"]["dataset_commit"] is None


def spec(study: Study, run: str = "exact") -> Any:
    return json.loads((study.output / run / "spec.json").read_text())


def test_samples_of_older_versions_are_compared_by_their_texts(study: Study) -> None:
    for path in study.output.glob("*/samples/*.json"):
        sample = json.loads(path.read_text())
        del sample["row_digest"], sample["environment"]
        path.write_text(json.dumps(sample))
    assert study.call("--inline", "--resume").code == 0
    assert study.call(verb="verify").code == 0
    edit(study, 4)
    end = study.call("--inline", "--resume")
    assert end.code == 2
    assert "1 row(s) differ from what the samples were made from: row 4" in end.out


def test_verify_says_when_there_is_no_dataset_to_compare_with(study: Study) -> None:
    (study.folder / "rows.parquet").unlink()
    verified = study.call(verb="verify")
    assert verified.code == 0, verified.out
    assert "the samples were not compared with the dataset: " in verified.out
    assert "no such file or directory" in verified.out
    assert study.call(verb="report").code == 0


def test_runs_on_other_content_are_not_compared_with_each_other(study: Study) -> None:
    """As older versions left them behind: an explainer that was added after the row was edited."""
    path = study.output / "standard_cc_ns16/samples/sample_00003_result.json"
    sample = json.loads(path.read_text())
    path.write_text(json.dumps({**sample, "row_digest": "0" * 32}))
    verified = study.call(verb="verify")
    assert verified.code == 1
    assert "1 row(s) were explained from other content in some runs than in others: row 3" in verified.out
    from mllm_shapx.reporting.comparison import compare_runs
    from mllm_shapx.reporting.reading import open_study
    from mllm_shapx.reporting.table import results_table

    left_out = {run.name: run.agreement.left_out for run in compare_runs(open_study(str(study.output)))}
    assert left_out == {"exact": 0, "limited_mc_frac0_5": 0, "standard_cc_ns16": 1}
    assert "standard_cc_ns16: 1 row(s) are not compared" in results_table(str(study.output), width=200)


def test_a_row_that_is_edited_while_it_is_half_answered_keeps_its_new_answers(study: Study) -> None:
    """Parts of the old conversation lie before those of the new one; the new ones count."""
    from mllm_shapx.records.answer import Answer
    from mllm_shapx.records.storage import LocalStorage
    from mllm_shapx.records.store import CoalitionStore, StoreHeader

    store = CoalitionStore(LocalStorage(study.output))
    store.append(9, "aa", StoreHeader({}, "old"), {1: Answer("of the old row")})
    store.append(9, "aa", StoreHeader({}, "new"), {1: Answer("of the new row")})
    found = store.read(9, "aa", StoreHeader({}))
    assert (found.snapshot_id, found.answers[1].text) == ("new", "of the new row")
    assert "another conversation" in found.notes[0]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_a_hub_dataset_stays_at_the_commit_that_was_used(hub: HubServer, tmp_path: Path) -> None:
    def commit(*texts: str) -> str:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"prompt": list(texts)}), buffer)
        return hub.add("dataset", "owner/rows", {"data/test-0.parquet": buffer.getvalue()})

    first = commit("please draw the harbor", "please tell us")
    dataset = {"source": "hf_parquet", "repo_id": "owner/rows", "subset": "default"}
    one_run = {"dataset": dataset, "experiments": [{"explainer_type": "exact"}]}
    study = Study(tmp_path / "study", settings=one_run)
    assert study.call("--inline", "--max-samples", "1").code == 0
    commit("please say nothing", "please sing", "please go")
    planned = study_plan(load_config(study.config))
    assert [row["num_players"] for row in planned.plan.to_json()["rows"]] == [4, 3]
    end = study.call("--inline", "--resume")
    assert end.code == 0, end.out
    assert spec(study)["dataset_commit"] == first
    sample = json.loads((study.output / "exact/samples/sample_00001_result.json").read_text())
    assert sample["prompt_texts"] == ["please tell us"]


def test_the_flag_needs_resume(study: Study) -> None:
    end = study.call("--inline", "--accept-changed-rows")
    assert end.code == 2
    assert "--accept-changed-rows goes with --resume" in end.out
