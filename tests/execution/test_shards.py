"""Shards of a set: each in a directory of its own, joined to what a single run makes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_study import Study, everything_below, results, untouched

from mllm_shapx.cli import main

ROWS = 7


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("plain"), rows=ROWS)
    assert study.call("--inline").code == 0
    return study


def merge(study: Study, *args: str) -> Result:
    return CliRunner().invoke(main, ["merge", str(study.output), *args])


def checkpoint(study: Study, run: str) -> Any:
    content = json.loads((study.output / run / "checkpoint.json").read_text())
    return {key: value for key, value in content.items() if key not in {"created_at", "updated_at"}}


def test_three_shards_merged_equal_the_plain_run(plain: Study, tmp_path: Path) -> None:
    study = Study(tmp_path, rows=ROWS)
    for words in (("--shard", "2/3"), ("--shard", "0/3"), ("--shard-index", "1", "--num-shards", "3")):
        assert study.call("--inline", *words).code == 0
    assert not study.samples_on_disk()
    first = study.output / "shards" / "0-of-3"
    names = {path.name for path in (first / "exact" / "samples").iterdir()}
    assert names == {f"sample_{row:05d}_result.json" for row in (0, 3, 6)}, "every third row"

    found = merge(study)
    assert found.exit_code == 0, found.output
    assert f"{3 * ROWS} of {3 * ROWS} samples" in found.output
    assert results(study.output) == results(plain.output)
    ignored = {"pace.json", "progress.json"}
    assert everything_below(study.output) == everything_below(plain.output) - ignored
    for run in (path.parent.name for path in plain.output.glob("*/spec.json")):
        assert checkpoint(study, run) == checkpoint(plain, run)
        specs = [json.loads((each.output / run / "spec.json").read_text()) for each in (study, plain)]
        for spec in specs:
            # These name the folder of the test.
            del spec["dataset_path"], spec["result_settings"]["dataset"], spec["dataset"]
            for entry in spec["environments"]:
                del entry["since"], entry["samples_before"]
        assert specs[0] == specs[1]
    assert CliRunner().invoke(main, ["verify", str(study.output)]).exit_code == 0
    with untouched(study.output):
        again = study.call("--inline", "--resume")
    assert again.code == 0
    assert "everything is done: no model is loaded" in again.out


def test_a_shard_resumes_and_an_incomplete_one_is_finished_after_the_merge(
    plain: Study, tmp_path: Path
) -> None:
    study = Study(tmp_path, rows=ROWS)
    for index in (0, 1):
        assert study.call("--inline", "--shard", f"{index}/2").code == 0
    sample = study.output / "shards" / "1-of-2" / "exact" / "samples" / "sample_00003_result.json"
    sample.unlink()
    again = study.call("--inline", "--shard", "1/2")
    assert again.code == 2
    assert "already holds finished samples" in again.out

    (study.output / "shards" / "1-of-2" / "generations").rename(tmp_path / "answers")
    offline = study.output / "shards" / "0-of-2" / "wandb" / "offline-run"
    offline.mkdir(parents=True)
    (offline / "run.wandb").write_text("not synced yet")
    found = merge(study)
    assert found.exit_code == 1
    assert f"{3 * ROWS - 1} of {3 * ROWS} samples" in found.output
    assert "to go on: mllm-shapx run --config" in found.output
    kept = study.output / "shards" / "merged-0-of-2.1" / "wandb" / "offline-run" / "run.wandb"
    assert kept.read_text() == "not synced yet"
    assert study.call("--inline", "--resume").code == 0
    assert results(study.output).keys() == results(plain.output).keys()


def test_what_does_not_fit_together_is_refused_and_nothing_is_moved(plain: Study, tmp_path: Path) -> None:
    study = Study(tmp_path, rows=ROWS, settings={"experiments": [{"explainer_type": "exact"}]})
    for words, said in (
        (("--shard", "3/3"), "shards count from 0, so that the last one is 2/3"),
        (("--shard", "one"), "'one' is not I/N"),
        (("--shard-index", "1"), "--shard-index and --num-shards go together"),
        (("--shard", "0/2", "--num-shards", "2"), "say the same; give one of them"),
        (("--shard", "8/9"), f"only {ROWS} row(s) are selected, so that this shard has none"),
    ):
        ended = study.call("--inline", *words)
        assert ended.code == 2
        assert said in ended.out
    assert not study.output.exists()
    assert "there are no shards to merge" in merge(study).output

    assert study.call("--inline", "--shard", "0/3").code == 0
    assert study.call("--inline", "--shard", "2/3").code == 0
    with untouched(study.output):
        refused = merge(study)
    assert refused.exit_code == 2
    assert "lacks the shard(s) 1/3; run them with `run --shard I/N` first" in refused.output
    whole = study.call("--inline")
    assert whole.code == 2
    assert "holds 2 shard(s) that are not merged" in whole.out
    shard = str(study.output / "shards" / "0-of-3")
    checked = CliRunner().invoke(main, ["verify", "--again", "1", shard])
    assert checked.exit_code == 2
    assert f"{shard} is a shard; `mllm-shapx merge {study.output}` first" in checked.output

    study.write_config(shap={"normalizer": "IdentityNormalizer"})
    assert study.call("--inline", "--shard", "1/3").code == 0
    with untouched(study.output):
        refused = merge(study)
    assert refused.exit_code == 2
    assert "was made with other settings than the shards before it: shap.normalizer" in refused.output
    done = plain.call("--inline", "--shard", "0/2")
    assert done.code == 2
    assert "holds samples of the whole set already; leave --shard out" in done.out
