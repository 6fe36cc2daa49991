"""What was computed where, and how many files there are: specs keep the history, the end counts the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner
from small_study import Sabotage, Study, results

from mllm_shapx.cli import main

RUN = "limited_mc_ns8"
ONE_RUN = {"experiments": [{"explainer_type": "limited_mc", "num_samples": [8]}]}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study of which half is done."""
    study = Study(tmp_path, rows=4, settings=ONE_RUN)
    end = study.call("--inline", "--max-samples", "2")
    assert end.code == 0, end.out
    return study


def spec(study: Study) -> Any:
    return json.loads((study.output / RUN / "spec.json").read_text())


def change_spec(study: Study, **changes: Any) -> None:
    path = study.output / RUN / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def environments(study: Study) -> dict[int, str]:
    samples = [json.loads(path.read_text()) for path in (study.output / RUN / "samples").iterdir()]
    return {sample["row_index"]: sample["environment"] for sample in samples}


def test_a_resume_with_other_libraries_is_told_and_both_stay_recorded(study: Study) -> None:
    (now,) = spec(study)["environments"]
    assert set(environments(study).values()) == {now["id"]}
    assert (now["device"], now["dtype"], now["samples_before"]) == ("cpu", "float32", 0)
    old_libraries = {**now["libraries"], "torch": "2.1.0"}
    old = {**now, "id": "0" * 8, "libraries": old_libraries, "dtype": "bfloat16"}
    change_spec(study, environments=[old], libraries=old_libraries)
    for path in (study.output / RUN / "samples").iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "environment": old["id"]}))
    idle = study.call("--inline", "--resume", "--max-samples", "2")
    assert idle.code == 0
    assert spec(study)["environments"] == [old], "nothing was computed"
    assert spec(study)["libraries"] == old_libraries
    end = study.call("--inline", "--resume")
    assert end.code == 0
    torch = now["libraries"]["torch"]
    assert (
        f"2 sample(s) were made with something else (torch 2.1.0 -> {torch}, dtype bfloat16 -> float32)"
        in (end.out)
    )
    assert spec(study)["environments"][0] == old
    assert {**now, "samples_before": 2, "since": 0.0} == {**spec(study)["environments"][1], "since": 0.0}
    assert spec(study)["libraries"] == now["libraries"]
    assert environments(study) == {0: old["id"], 1: old["id"], 2: now["id"], 3: now["id"]}
    again = study.call("--inline", "--resume")
    assert "something else" not in again.out


def test_the_same_libraries_are_no_news(study: Study) -> None:
    end = study.call("--inline", "--resume")
    assert end.code == 0
    assert "something else" not in end.out
    assert len(spec(study)["environments"]) == 1


def test_a_spec_of_an_older_version_gives_the_first_entry(study: Study) -> None:
    written = spec(study)
    del written["environments"]
    written["libraries"]["transformers"] = "4.40.0"
    (study.output / RUN / "spec.json").write_text(json.dumps(written))
    end = study.call("--inline", "--resume")
    assert "(transformers 4.40.0 -> " in end.out
    first, second = spec(study)["environments"]
    assert (first["id"], first["libraries"]["transformers"]) == (None, "4.40.0")
    assert second["samples_before"] == 2


# --- files are the truth


@pytest.mark.timeout(120)
def test_samples_that_vanish_while_the_study_runs_are_missed_at_the_end(tmp_path: Path) -> None:
    sabotage = Sabotage(tmp_path)
    study = Study(tmp_path, rows=4, settings=ONE_RUN, env=sabotage.env)
    sabotage.set(slow=[2, 3], slow_s=3)
    process = study.start("--inline", "--rows-in-flight", "1")
    process.wait_for(lambda: study.samples_on_disk() == 2)
    shutil.rmtree(study.output / RUN / "samples")
    end = process.wait()
    assert end.code == 1, end.out
    assert f"error: 2 sample(s) that were written are not on disk any more: {RUN} (2)" in end.out
    assert "study: 2 of 4 samples" in end.out
    assert "--resume" in end.out.splitlines()[-1]
    sabotage.set()
    assert study.call("--inline", "--resume").code == 0
    assert study.call(verb="verify").code == 0


# --- nothing to ask the model for


def run_without_inline(study: Study, *args: str) -> tuple[int, str]:
    """Call `run` in this process as for Ray, which may not be started."""
    found = CliRunner().invoke(main, ["run", "--config", str(study.config), "--resume", *args])
    assert not ray.is_initialized()
    return found.exit_code, found.output


def test_a_finished_study_starts_no_ray_and_loads_no_model(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, said = run_without_inline(study, "--max-samples", "2")
    assert code == 0, said
    assert "everything is done: no model is loaded" in said
    assert "study: 2 of 2 samples" in said


def test_samples_whose_answers_are_stored_are_computed_without_a_model(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    shap = {"shap_override": {"normalizer": "IdentityNormalizer"}}
    added = [*ONE_RUN["experiments"], {**ONE_RUN["experiments"][0], "name": "raw", **shap}]
    study.write_config(experiments=added)
    code, said = run_without_inline(study, "--max-samples", "2")
    assert code == 0, said
    assert "2 row(s) are computed from stored answers: no model is loaded" in said
    assert "(0 model calls" in said
    undisturbed = Study(tmp_path / "undisturbed", rows=4, settings={"experiments": added})
    assert undisturbed.call("--inline", "--max-samples", "2").code == 0
    assert results(study.output) == results(undisturbed.output)


@pytest.mark.slow
def test_trackers_follow_a_study_from_stored_answers_to_the_model(tmp_path: Path) -> None:
    """The first row's samples come from the store; then workers start, and the trackers open again."""
    exact, sampling = {"explainer_type": "exact"}, ONE_RUN["experiments"][0]
    study = Study(tmp_path, rows=4, settings={"wandb": {"enabled": True, "mode": "offline"}})
    study.write_config(experiments=[exact])
    assert study.run("--inline", "--max-samples", "1").code == 0
    study.write_config(experiments=[sampling])
    assert study.run("--inline", "--resume", "--max-samples", "2").code == 0
    for path in study.output.glob("*/samples/*"):
        path.unlink()
    study.write_config(experiments=[exact, sampling])
    end = study.run("--resume", "--max-samples", "2")
    assert end.code == 0, end.out
    assert len(list(study.output.glob("wandb/offline-run-*-study-exact-*"))) == 3, "one for each opening"
    assert study.call(verb="verify").code == 0


def test_what_is_stored_in_part_goes_to_the_model(study: Study, tmp_path: Path) -> None:
    """One row's answers are enough for the added run and the other's are not."""
    for path in sorted(study.output.glob("generations/00001-*.parquet")):
        path.unlink()
    (study.output / RUN / "samples/sample_00000_result.json").unlink()
    (study.output / RUN / "samples/sample_00001_result.json").unlink()
    end = study.call("--inline", "--resume", "--max-samples", "2")
    assert end.code == 0, end.out
    assert "no model is loaded" not in end.out
    undisturbed = Study(tmp_path / "undisturbed", rows=4, settings=ONE_RUN)
    assert undisturbed.call("--inline", "--max-samples", "2").code == 0
    assert results(study.output) == results(undisturbed.output)
    assert study.call(verb="verify").code == 0


def test_answers_that_turn_out_too_few_go_to_the_model(study: Study) -> None:
    added = [*ONE_RUN["experiments"], {"explainer_type": "exact"}]
    study.write_config(experiments=added)
    end = study.call("--inline", "--resume", "--max-samples", "2")
    assert end.code == 0, end.out
    assert f"({2 * (2**5 - 8)} model calls" in end.out
    assert study.call(verb="verify").code == 0
