"""A model or an encoder whose files change under a study: nothing is answered by B under A's name."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from model_kit import load_text_model
from small_study import MODEL, Sabotage, Study, results, untouched

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import ModelChangedError, ModelError
from mllm_shapx.execution.inline import InlineCrew
from mllm_shapx.execution.lifecycle import Call, run_to_end
from mllm_shapx.execution.loading import load_study_model
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import open_output, prepare
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.models.identity import Version, stamp_of
from mllm_shapx.reporting.progress import ProgressReporter

ONE_RUN = {"experiments": [{"explainer_type": "limited_mc", "num_samples": [8]}]}


def make_other(directory: Path) -> None:
    """Overwrite the weights in place by others of the same size, and set the time of the file back."""
    path = directory / "model.safetensors"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        rest = file.read()
        file.seek(status.st_size // 2)
        file.write(rest[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    return directory


def study_on(model: Path, folder: Path, **settings: object) -> Study:
    kwargs = {"model_id": str(model), "dtype": "float32"}
    return Study(folder, rows=3, settings={**ONE_RUN, "connector_kwargs": kwargs, **settings})


def test_a_model_that_changes_before_it_is_loaded_answers_nothing(model: Path, tmp_path: Path) -> None:
    folder = study_on(model, tmp_path / "study")
    study, _ = prepare(load_config(folder.config), RunOptions())
    make_other(model)
    output = open_output(study)
    call = Call(ProgressReporter(sys.stderr), StopRequest())
    with pytest.raises(ModelChangedError, match="are not the ones that the study began with") as caught:
        run_to_end(InlineCrew(study, output, call, load_study_model), study, output, call)
    output.lock.release()
    assert str(model) in str(caught.value)
    assert caught.value.exit_code == 1
    assert folder.samples_on_disk() == 0
    assert not (folder.output / "generations").exists()


def test_files_that_change_while_they_are_read_or_loaded_are_noticed(model: Path) -> None:
    def read() -> str:
        make_other(model)
        return "digest"

    with pytest.raises(ModelError, match="changed while they were read"):
        Version.of("the.key", [model], read)
    version = Version.of("the.key", [model], lambda: "digest")

    def load() -> None:  # what is loaded is other, though the files are the old ones again at the end
        make_other(model)
        make_other(model)

    with pytest.raises(ModelChangedError, match=r"the\.key: the files in"):
        version.loaded(load, lambda: "digest")


def test_a_stamp_follows_links_and_stands_for_the_content_once_files_have_settled(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "weights").write_text("A")
    model = tmp_path / "model"
    model.mkdir()
    (model / "linked").symlink_to(shards)
    (shards / "back").symlink_to(model)
    assert stamp_of([model]) == "", "a file this young proves nothing"
    read: list[str] = []

    def digest() -> str:
        read.append("once more")
        return "A"

    settled = Version("the.key", (model,), "A", "stamp of another machine")
    settled.loaded(lambda: None, digest)
    assert read, "where stamps tell nothing the files are read"
    (shards / "weights").write_text("B")
    with pytest.raises(ModelChangedError):
        settled.loaded(lambda: None, lambda: "B")


def test_a_loaded_model_does_not_change_with_its_file(model: Path) -> None:
    loaded = load_text_model(model)
    before = [parameter.detach().clone() for parameter in loaded.network.parameters()]
    make_other(model)
    assert all(map(torch.equal, before, loaded.network.parameters()))


def values_in(study: Study) -> dict[str, object]:
    found = results(study.output)
    return {path: sample["conversation"] for path, sample in found.items() if "/samples/" in path}


@pytest.mark.timeout(300)
def test_a_replaced_worker_that_finds_another_model_ends_the_study(model: Path, tmp_path: Path) -> None:
    sabotage = Sabotage(tmp_path)
    study = study_on(model, tmp_path / "study")
    study.env = sabotage.env
    sabotage.set(slow=[0, 1, 2], slow_s=4)
    process = study.start("--num-workers", "1", "--rows-in-flight", "1")
    process.wait_for(lambda: study.samples_on_disk() >= 1)
    make_other(model)
    sabotage.set(die=[0, 1, 2])
    end = process.wait()
    assert end.code == 1, end.out
    assert end.out.count("are not the ones that the study began with") == 1
    (failure,) = study.output.glob("*/failures/*")
    assert not json.loads(failure.read_text())["quarantined"], "only its worker was killed"
    sabotage.set()
    assert study.call("--inline", "--resume").code == 2, "it is another model: its digest differs"
    make_other(model)
    assert study.call("--inline", "--resume").code == 0
    undisturbed = study_on(MODEL, tmp_path / "undisturbed")
    assert undisturbed.call("--inline").code == 0
    assert values_in(study) == values_in(undisturbed)


# --- the external encoder


def with_encoder(encoder: Path | str, folder: Path) -> Study:
    shap = {"similarity": "CosineSimilarity"}
    return Study(folder, rows=2, settings={**ONE_RUN, "shap": shap, "embedding": {"model_id": str(encoder)}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no_such_encoder", "there is no directory './no_such_encoder'"),
        ("{empty}", "is no encoder, for lack of config.json and weights"),
    ],
)
def test_a_mistyped_encoder_is_refused_before_anything_is_answered(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    study = with_encoder(name.format(empty=tmp_path / "empty"), tmp_path / "study")
    validated = CliRunner().invoke(main, ["validate", "--config", str(study.config)])
    assert validated.exit_code == 2
    assert f"embedding.model_id: {said}" in validated.output.replace(f"'{tmp_path}/empty' ", "")
    with untouched(study.folder):
        assert study.call("--inline").code == 2


def test_an_encoder_that_cannot_be_loaded_ends_the_study(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    study = with_encoder(model, tmp_path / "study")
    end = study.call("--inline")
    assert end.code == 2
    assert "embedding.model_id: the encoder" in end.out
    assert not (study.output / "generations").exists(), "no answer was asked for"


def test_one_run_has_one_encoder(model: Path, tmp_path: Path) -> None:
    study = with_encoder(model, tmp_path / "study")
    assert study.call("--inline").code == 0
    (spec,) = study.output.glob("*/spec.json")
    assert len(json.loads(spec.read_text())["result_settings"]["embedding_commit"]) == 64
    make_other(model)
    resumed = study.call("--inline", "--resume")
    assert resumed.code == 2
    assert "limited_mc_ns8: embedding_commit" in resumed.out
    rescored = CliRunner().invoke(main, ["rescore", "--config", str(study.config), "--overwrite"])
    assert rescored.exit_code == 2
    assert "vector(s) of 2 row(s) are not stored" in rescored.output
    make_other(model)
    rescored = CliRunner().invoke(main, ["rescore", "--config", str(study.config), "--overwrite"])
    assert rescored.exit_code == 0, rescored.output
    assert "2 of 2 samples" in rescored.output
