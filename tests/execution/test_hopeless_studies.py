"""A study in which nothing works stops early instead of giving up every row."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mllm_shapx.cli import main
from mllm_shapx.models.hf_text import HfTextModel

ROOT = Path(__file__).parents[2]


def test_rows_that_all_fail_alike_stop_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def broken(*_: object) -> None:
        raise ArithmeticError("the weights are full of NaN")

    monkeypatch.setattr(HfTextModel, "answer", broken)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "base": str(ROOT / "configs/demo.json"),
        "output_root": str(tmp_path),
        "experiment_set_id": "hopeless",
        "experiments": [{"explainer_type": "limited_mc", "num_samples": [-1]}],
    }))  # fmt: skip
    result = CliRunner().invoke(main, ["run", "--config", str(config), "--inline"])
    assert result.exit_code == 1
    assert "the first 10 rows all failed with ArithmeticError: the weights are full of NaN" in result.stderr
    failed = list((tmp_path / "hopeless/limited_mc_ns-1/failures").iterdir())
    assert 10 <= len(failed) < 24, "rows in flight may fail too"


def test_an_error_of_the_dataset_names_the_config_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "base": str(ROOT / "configs/demo.json"), "output_root": str(tmp_path / "out"),
        "dataset": {"column_mapping": {"text": "promt"}},
    }))  # fmt: skip
    result = CliRunner().invoke(main, ["run", "--config", str(config), "--inline"])
    assert result.exit_code == 2
    assert str(config) in result.stderr
    assert "dataset.column_mapping.text" in result.stderr
    assert not (tmp_path / "out").exists()
