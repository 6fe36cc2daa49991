"""Calls of `run` that the user can mend: one message that says how, exit code 2, not a file more."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_study import Study, results, untouched

from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.storage import open_storage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Return a study that is done; tests that change it work on a copy."""
    study = Study(tmp_path_factory.mktemp("finished"), rows=3, settings={"experiments": ONE_RUN})
    assert study.call("--inline").code == 0
    return study


ONE_RUN = [{"explainer_type": "limited_mc", "num_samples": [8]}]
RUN = "limited_mc_ns8"


def copy_of(study: Study, folder: Path) -> Study:
    shutil.copytree(study.folder, folder, dirs_exist_ok=True)
    rows = {"source": "local_parquet", "path": str(study.folder / "rows.parquet")}
    return Study(folder, rows=study.rows, settings={**study.settings, "dataset": rows})


def typo(study: Study) -> None:
    study.write_config(devise="cpu")


def no_model(study: Study) -> None:
    (study.folder / "model").mkdir()
    study.write_config(connector_kwargs={"model_id": str(study.folder / "model"), "dtype": "float32"})


def empty_selection(study: Study) -> None:
    study.write_config(selection={"filters": [{"column": "language", "op": "==", "value": "tlh"}]})


def unreadable_parquet(study: Study) -> None:
    path = study.folder / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-40])


def path_in_the_id(study: Study) -> None:
    study.write_config(experiment_set_id="../x")


def output_is_a_file(study: Study) -> None:
    (study.folder / "taken").write_text("not a folder")
    study.write_config(output_root=str(study.folder / "taken"))


def nothing(_study: Study) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "words", "args"),
    [
        (typo, ["devise", "device"], ["--inline"]),
        (no_model, ["config.json", "model"], ["--inline"]),
        (empty_selection, ["selection", "no row"], ["--inline"]),
        (unreadable_parquet, ["config.json", "rows.parquet", "write or download it again"], ["--inline"]),
        (path_in_the_id, ["experiment_set_id", "../x"], ["--inline"]),
        (output_is_a_file, ["taken", "output_root"], ["--inline"]),
        (nothing, ["leave out one of --json and --table"], ["--inline", "--json", "--table"]),
        (nothing, ["--num-gpus 2 asks for more GPUs than there are", "--num-workers"], ["--num-gpus", "2"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_call_is_refused_before_anything_is_written(
    tmp_path: Path, spoil: Callable[[Study], None], words: list[str], args: list[str]
) -> None:
    study = Study(tmp_path, rows=3, settings={"experiments": ONE_RUN})
    spoil(study)
    with untouched(tmp_path):
        end = study.call(*args) if "--inline" in args else study.run(*args)
    assert end.code == 2
    assert end.out.startswith("error: "), end.out
    for word in words:
        assert word in end.out


def test_an_unwritable_output_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # Root may write anywhere but on a file system that cannot be written.
        study = Study(tmp_path, rows=3, settings={"output_root": "/proc/results"})
    else:
        (tmp_path / "output").mkdir(mode=0o500)
        study = Study(tmp_path, rows=3)
    with untouched(tmp_path):
        end = study.call("--inline")
    assert end.code == 2
    assert "cannot be written" in end.out
    assert "output_root" in end.out


def test_results_are_not_touched_without_resume_or_overwrite(finished: Study) -> None:
    with untouched(finished.folder):
        end = finished.call("--inline")
    assert end.code == 2
    assert f"already holds finished samples: {RUN} (3)" in end.out
    assert "--resume" in end.out
    assert "--overwrite" in end.out


def test_resuming_with_other_settings_names_the_keys_and_changes_nothing(
    finished: Study, tmp_path: Path
) -> None:
    study = copy_of(finished, tmp_path)
    study.write_config(
        generation={"max_new_tokens": 5, "text_temperature": 0.0}, shap={"normalizer": "IdentityNormalizer"}
    )
    with untouched(tmp_path):
        end = study.call("--inline", "--resume")
    assert end.code == 2
    assert f"{RUN}: generation.max_new_tokens, shap.normalizer" in end.out
    assert "--overwrite" in end.out


def test_more_rows_and_more_variants_are_welcome_when_resuming(finished: Study, tmp_path: Path) -> None:
    study = copy_of(finished, tmp_path)
    before = results(study.output)
    study.write_config(experiments=[*ONE_RUN, {"explainer_type": "exact"}])
    assert study.call("--inline", "--resume").code == 0
    after = results(study.output)
    summary = "limited_mc_ns8/summary/aggregate_metrics.json"
    assert after[summary].pop("against_exact")["n_samples"] == 3, "there is an exact run now"
    before[summary].pop("against_exact")
    assert {path: after[path] for path in before} == before
    assert sum(path.startswith("exact/samples/") for path in after) == 3


def test_a_run_without_its_checkpoint_starts_afresh_and_keeps_the_old_samples_aside(
    finished: Study, tmp_path: Path
) -> None:
    study = copy_of(finished, tmp_path)
    before = results(study.output)
    (study.output / RUN / "checkpoint.json").unlink()
    end = study.call("--inline")
    assert end.code == 0
    assert "samples without a checkpoint moved to" in end.out
    assert results(study.output) == before
    aside = list((study.output / RUN).glob("set_aside_*/samples/*.json"))
    assert len(aside) == 3
    checkpoint = json.loads((study.output / RUN / "checkpoint.json").read_text())
    assert checkpoint["completed_indices"] == [0, 1, 2]


def test_overwriting_starts_again_and_asks_the_model_nothing_that_is_stored(
    finished: Study, tmp_path: Path
) -> None:
    study = copy_of(finished, tmp_path)
    before = results(study.output)
    end = study.call("--inline", "--overwrite")
    assert end.code == 0
    assert "(0 model calls" in end.out
    assert results(study.output) == before


def test_a_second_driver_is_refused_naming_the_first(finished: Study, tmp_path: Path) -> None:
    study = copy_of(finished, tmp_path)
    lock = OutputLock(open_storage(str(study.output)))
    lock.acquire()
    try:
        end = study.call("--inline", "--resume")
    finally:
        lock.release()
    assert end.code == 2
    assert f"is in use by process {os.getpid()} on " in end.out
    assert "started 2" in end.out
