"""Models come from a hub at their pinned commit: the real loading code against a small loopback hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("demo", "model"), [("demo", "demo/model"), ("demo_audio", "demo_audio/model")], ids=["text", "audio"]
)
def test_a_study_loads_its_model_from_the_hub_at_the_pinned_commit(
    demo: str, model: str, tmp_path: Path
) -> None:
    with HubServer() as hub:
        pinned = hub.add_folder("model", "owner/model", ROOT / model)
        hub.add("model", "owner/model", {"config.json": b"{}"})
        config = tmp_path / "config.json"
        content: dict[str, Any] = {
            "base": str(ROOT / "configs" / f"{demo}.json"),
            "output_root": str(tmp_path / "out"),
            "experiment_set_id": "hub",
            "connector_kwargs": {"model_id": "owner/model", "revision": pinned},
            "selection": {"max_samples": 1},
            "experiments": [{"explainer_type": "limited_mc", "num_samples": [-1]}],
        }
        config.write_text(json.dumps(content))
        done = subprocess.run(
            [sys.executable, "-m", "mllm_shapx.cli", "run", "--config", str(config), "--inline"],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    spec = json.loads((tmp_path / "out/hub/limited_mc_ns-1/spec.json").read_text())
    assert spec["result_settings"]["model_commit"] == pinned
    assert len(list((tmp_path / "out/hub/limited_mc_ns-1/samples").iterdir())) == 1
