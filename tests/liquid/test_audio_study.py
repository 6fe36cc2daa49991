"""Spoken studies from config to files: interleaved input, spoken output, a run that is killed and resumed."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from liquid_kit import checkpoint, sound, wav

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def _command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "mllm_shapx.cli", "run", "--inline", "--config", str(config), *options]


def _run(config: Path, *options: str) -> None:
    done = subprocess.run(_command(config, *options), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path


def _samples(run: Path) -> dict[str, dict[str, Any]]:
    found = {path.name: json.loads(path.read_text()) for path in (run / "samples").glob("*.json")}
    for sample in found.values():
        del sample["runtime_sec"]
    return found


def _recordings(run: Path) -> dict[Path, bytes]:
    return {path.relative_to(run): path.read_bytes() for path in run.glob("audio/*/*")}


def test_an_interleaved_row_with_a_spoken_answer_becomes_files(tmp_path: Path) -> None:
    """Pieces alternate, both modalities carry values, and the answer's codes lie beside the sample."""
    rng = np.random.default_rng(2)  # recordings that make the random model speak
    row = {
        "sentences": ["tell me now", "what is this", "thank you"],
        "audio_male": [{"bytes": wav(sound(rng, 0.3)), "path": None} for _ in range(3)],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    config = {
        "experiment_set_id": "spoken",
        "output_root": str(tmp_path / "out"),
        "connector": "liquid_audio",
        "connector_kwargs": {"model_id": str(checkpoint()), "dtype": "float32"},
        "device": "cpu",
        "dataset": {"source": "local_parquet", "path": str(tmp_path / "rows.parquet")},
        "modality": {"input_modality": "interleaved__text_first__male", "output_modality": "audio"},
        "generation": {"max_new_tokens": 8, "text_temperature": 0.0},
        "audio_segmentation": {"window_ms": 150},
        "wandb": {"enabled": False},
        "experiments": [
            {"explainer_type": "exact"},
            {
                "explainer_type": "limited_mc",
                "fractions": [0.5],
                "shap_override": {"similarity": "CosineSimilarity", "reducer": "MaxReducer"},
            },
        ],
    }
    _run(_write(tmp_path / "spoken.json", config))
    for run in ("exact", "limited_mc_frac0_5"):
        folder = tmp_path / "out" / "spoken" / run
        (sample,) = _samples(folder).values()
        kinds = [[entry["content_type"] for entry in turn] for turn in sample["conversation"]]
        assert kinds == [[0], [0], [1], [0], [0, 1]]
        assert sample["attr_summary"]["count_text_tokens"] == 5
        assert sample["attr_summary"]["count_audio_segments"] == 2
        artifacts = sample["audio_artifacts"]
        assert (folder / artifacts["inputs"][0]["path"]).read_bytes() == row["audio_male"][1]["bytes"]  # type: ignore[index]
        frames = json.loads((folder / artifacts["answer"]["path"]).read_text())["frames"]
        assert len(frames) == artifacts["answer"]["num_frames"] > 0


def test_a_killed_study_resumes_to_the_same_samples(tmp_path: Path) -> None:
    """SIGKILL amid the audio demo, then `--resume`: samples and recordings equal the undisturbed run's."""
    demo = json.loads((ROOT / "configs" / "demo_audio.json").read_text())
    demo["selection"]["max_samples"] = 6
    configs = [
        _write(tmp_path / f"{name}.json", {**demo, "output_root": str(tmp_path / name)})
        for name in ("whole", "killed")
    ]
    _run(configs[0])
    whole, killed = (tmp_path / name / "demo_audio" / "exact" for name in ("whole", "killed"))
    driver = subprocess.Popen(
        _command(configs[1]), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not list(killed.glob("samples/sample_*_result.json")) and driver.poll() is None:
        assert time.monotonic() < deadline, "the study wrote no sample"
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    _run(configs[1], "--resume")
    assert _samples(killed) == _samples(whole)
    recordings = [
        {path.relative_to(run): path.read_bytes() for path in run.glob("audio/*/*")}
        for run in (whole, killed)
    ]
    assert recordings[0] == recordings[1]
    assert len(recordings[0]) == 6
