"""What a model has to say of how it answers reaches the user once, and stays in the specs."""

import json
import shutil
from pathlib import Path
from typing import Any

from small_study import MODEL, Study


def model_with(folder: Path, **settings: Any) -> Path:
    """Copy the demo's model and change its generation config."""
    target = folder / "model"
    shutil.copytree(MODEL, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return target


def test_a_replaced_setting_is_said_once_and_kept_in_every_spec(tmp_path: Path) -> None:
    """Three runs, one note; `spec.json` says what answers end with and what was not applied."""
    model = model_with(tmp_path, num_beams=4, eos_token_id=[1, 1536])
    kwargs = {"model_id": str(model), "dtype": "float32"}
    study = Study(tmp_path / "study", rows=2, settings={"connector_kwargs": kwargs})
    found = study.call("--inline")
    assert found.code == 0, found.out
    assert found.out.count("num_beams = 4") == 1
    specs = [json.loads(path.read_text()) for path in study.output.glob("*/spec.json")]
    assert len(specs) == 3
    for spec in specs:
        assert spec["model"]["generation_config"] == {
            "eos_token_id": [1, 1536],
            "not_applied": {"num_beams": 4},
        }
        assert spec["model"]["decoding"] == "own loop"
        assert any("num_beams = 4" in note for note in spec["model"]["notes"])
    study.call("--inline", "--resume")
    after = [json.loads(path.read_text()) for path in study.output.glob("*/spec.json")]
    assert [spec["model"] for spec in after] == [spec["model"] for spec in specs]


def test_a_setting_that_cannot_be_honoured_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """One message names the setting; no directory appears."""
    kwargs = {"model_id": str(model_with(tmp_path, stop_strings=["the"])), "dtype": "float32"}
    study = Study(tmp_path / "study", rows=2, settings={"connector_kwargs": kwargs})
    found = study.call("--inline")
    assert found.code == 2
    assert "stop_strings = ['the'] (stop strings)" in found.out
    assert not study.output.exists()
