"""Directories of the older runner and of earlier versions: read by every command, and never mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from older_directories import OLDER_VALUES, write_earlier_study, write_older_directory
from small_study import Study, untouched

from mllm_shapx.cli import main
from mllm_shapx.records.checkpoint import Checkpoint
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.table import results_table

BLOCKS: dict[str, Any] = {
    "connector": "hf_text",
    "device": "cpu",
    "dataset": {"source": "hf_parquet", "subset": "single_sentence"},
    "selection": {"max_samples": 2},
    "generation": {"max_new_tokens": 32, "text_temperature": 0.0},
    "modality": {"input_modality": "text", "output_modality": "text"},
    "audio_segmentation": {"method": "raw"},
    "shap": {"normalizer": "AbsSumNormalizer", "similarity": "TfIdfCosineSimilarity"},
    "embedding": {},
    "chat": {"system_prompt": "You are a helpful assistant."},
}


def call(*args: str) -> Result:
    found = CliRunner().invoke(main, list(args))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return write_older_directory(tmp_path / "output" / "study", BLOCKS)


def test_every_command_that_reads_takes_an_older_directory(older: Path, tmp_path: Path) -> None:
    with untouched(older):
        told = call("status", str(older), "--check", "--json")
        assert told.exit_code == 0
        found = json.loads(told.output)
        assert [(run["name"], run["done"], run["failed"], run["total"]) for run in found["runs"]] == [
            (name, 2, 0, None) for name in OLDER_VALUES
        ]
        assert found["next_steps"] == ["written by the older runner: it can be read, but not resumed"]
        assert "neyman_frac0_5" in call("status", str(older)).output
        verified = call("verify", str(older))
        assert (verified.exit_code, "2 run(s), 4 sample(s)" in verified.output) == (0, True), verified.output
        assert "written by the older runner" in verified.output
        assert call("failures", str(older)).exit_code == 0
        assert call("retry", str(older)).exit_code == 0
        assert call("store", "info", str(older)).exit_code == 0
        page = tmp_path / "page.html"
        assert call("report", str(older), "--output", str(page)).exit_code == 0
    assert "Copper is a metal." in page.read_text()
    table = results_table(str(older))
    assert "answer: Copper is a metal." in table
    # The mean correlation of both rows with the exact run's, by numpy.corrcoef.
    (line,) = [line for line in table.splitlines() if line.strip().startswith("neyman_frac0_5")]
    assert "0.990" in line


def test_verify_finds_what_is_wrong_in_an_older_directory(older: Path) -> None:
    sample = older / "exact" / "samples" / "sample_00001_result.json"
    data = json.loads(sample.read_text())
    data["attr_summary"]["abs_sum_text"] = 7.0
    sample.write_text(json.dumps(data))
    (older / "exact" / "samples" / "sample_00000_result.json").unlink()
    summary = older / "neyman_frac0_5" / "summary" / "aggregate_metrics.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "runtime_sec_avg": 9.0}))
    told = call("verify", str(older))
    assert told.exit_code != 0
    for said in ("attr_summary's sums give 7", "row 0", "runtime_sec_avg"):
        assert said in told.output


def test_a_run_is_read_by_itself(older: Path) -> None:
    told = call("status", str(older / "exact"), "--json")
    assert [run["name"] for run in json.loads(told.output)["runs"]] == ["exact"]
    assert call("verify", str(older / "exact")).exit_code == 0


@pytest.mark.parametrize("verb", [["run", "--inline"], ["run", "--inline", "--resume"], ["rescore"]])
def test_nothing_is_added_to_the_samples_of_an_older_directory(tmp_path: Path, verb: list[str]) -> None:
    study = Study(tmp_path, rows=2, settings={"experiments": [{"explainer_type": "exact"}]})
    write_older_directory(study.output, BLOCKS)
    with untouched(tmp_path):
        told = call(*verb, "--config", str(study.config))
    assert told.exit_code == 2
    assert "holds runs of the older runner: exact" in told.output
    assert "--overwrite" in told.output


def test_an_older_run_is_moved_aside_when_that_is_asked_for(tmp_path: Path) -> None:
    study = Study(tmp_path, rows=2, words=3, settings={"experiments": [{"explainer_type": "exact"}]})
    write_older_directory(study.output, BLOCKS)
    before = (study.output / "exact" / "samples" / "sample_00000_result.json").read_bytes()
    end = study.call("--inline", "--overwrite")
    assert end.code == 0, end.out
    (aside,) = study.output.glob("exact/set_aside_*")
    assert (aside / "samples" / "sample_00000_result.json").read_bytes() == before
    assert json.loads((aside / "spec.json").read_text())["run_slug"] == "exact"
    assert json.loads((study.output / "exact" / "spec.json").read_text())["run_name"] == "exact"
    # The other run of the directory is not the study's.
    assert call("verify", str(study.output)).exit_code == 0


def test_a_damaged_spec_of_ours_is_not_taken_for_an_older_one(older: Path) -> None:
    """Ours names the run `run_slug` too; without its result settings it is damaged and moved aside."""
    path = older / "exact" / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_name": "exact"}))
    records = RunRecords(open_storage(str(older)), "exact")
    assert not records.is_of_older_runner()
    spec, notes = records.heal_spec()
    assert (spec, "it holds no result_settings" in notes[0]) == (None, True)


@pytest.mark.parametrize("version", [[], {}, "1", 3])
def test_a_checkpoint_of_no_known_version_is_refused(version: Any) -> None:
    times = {"created_at": 1.0, "updated_at": 1.0}
    data = {"version": version, "completed_indices": [], "next_index": 0, **times}
    with pytest.raises(ValueError, match="its version is"):
        Checkpoint.from_bytes(json.dumps(data).encode())


def test_a_file_with_a_schema_version_must_be_complete(older: Path) -> None:
    sample = older / "exact" / "samples" / "sample_00000_result.json"
    sample.write_text(json.dumps({**json.loads(sample.read_text()), "schema_version": 2}))
    told = call("verify", str(older))
    assert told.exit_code != 0
    assert "lacks the field base_value" in told.output


def test_what_an_earlier_version_wrote_is_read_resumed_and_computed_again(tmp_path: Path) -> None:
    config = write_earlier_study(tmp_path)
    output = tmp_path / "output" / "study"
    samples = {path: path.read_bytes() for path in output.glob("*/samples/*.json")}
    with untouched(tmp_path):
        for verb in ("status", "verify", "failures"):
            told = call(verb, str(output))
            assert told.exit_code == 0, told.output
        assert "2/2" in call("status", str(output)).output
    assert call("report", str(output)).exit_code == 0
    end = call("run", "--inline", "--resume", "--config", str(config), "--max-samples", "3")
    assert end.exit_code == 0, end.output
    assert {path: path.read_bytes() for path in samples} == samples
    assert sorted(path.name for path in output.iterdir() if (path / "spec.json").exists()) == [
        "exact",
        "hier_limited_neyman_k2_imp0_1",
        "hier_neyman_k2_imp0_1",
        "limited_neyman_frac0_5",
    ]
    assert "an earlier version has done it as hier_limited_neyman_k2_imp0_1, which is kept" in end.output
    for run in ("exact", "limited_neyman_frac0_5", "hier_neyman_k2_imp0_1"):
        assert len(list((output / run / "samples").iterdir())) == 3
    told = call("verify", str(output))
    assert told.exit_code == 0, told.output
    again = call("rescore", "--overwrite", "--config", str(config))
    assert again.exit_code == 0, again.output
    for path, before in samples.items():
        if "hier_" in str(path):
            continue
        old, new = json.loads(before), json.loads(path.read_text())
        assert new["conversation"][1:] == old["conversation"][1:]
        assert (old["conversation"][0], len(new["conversation"][0])) == ([], 1)
        assert new["seed"] == old["seed"]
        assert "raw_values" not in old
        assert len(new["raw_values"]) == new["num_players"]
