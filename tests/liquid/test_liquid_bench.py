"""`mllm-shapx bench` on spoken prompts, for which mllm_shap has no backend."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from liquid_kit import checkpoint, sound, wav

from mllm_shapx.cli import main


def test_spoken_prompts_are_measured_alone(tmp_path: Path) -> None:
    """The library's and plain generate's figures are null, ours is there, and a note says why."""
    rows = [wav(sound(np.random.default_rng(seed), 0.4)) for seed in range(2)]
    pq.write_table(pa.table({"audio": rows}), tmp_path / "rows.parquet")
    config = {
        "experiment_set_id": "spoken",
        "connector": "liquid_audio",
        "connector_kwargs": {"model_id": str(checkpoint()), "dtype": "float32"},
        "device": "cpu",
        "dataset": {"source": "local_parquet", "path": str(tmp_path / "rows.parquet")},
        "modality": {"input_modality": "audio__original"},
        "generation": {"max_new_tokens": 2, "text_temperature": 0.0},
        "audio_segmentation": {"window_ms": 100},
        "experiments": [{"explainer_type": "exact"}],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(
        main, ["bench", "--config", str(path), "--rows", "2", "--seconds", "0.5", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for key in ("library_coalitions_per_second", "ratio", "raw_coalitions_per_second", "fraction_of_raw"):
        assert found[key] is None
    assert found["coalitions_per_second"] > 0
    assert found["coalitions"] % 16 == 0
    assert any("no backend" in note for note in found["notes"])
