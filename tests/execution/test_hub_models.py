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
    """The commit is recorded; once it is in the cache, a hub that hangs costs one time limit."""
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
        online = _run(config, hub.url, tmp_path)
        hub.requests.clear()
        hub.hangs = True
        cached = _run(config, hub.url, tmp_path, "--overwrite") if demo == "demo" else online
        # One question, and what its client asks of its own accord; each costs the whole time limit.
        assert len(hub.requests) <= 2, hub.requests
    for done in (online, cached):
        assert done.returncode == 0, done.stderr
        assert "Retry" not in done.stderr
    spec = json.loads((tmp_path / "out/hub/limited_mc_ns-1/spec.json").read_text())
    assert spec["result_settings"]["model_commit"] == pinned
    assert len(list((tmp_path / "out/hub/limited_mc_ns-1/samples").iterdir())) == 1


def _run(config: Path, hub_url: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mllm_shapx.cli", "run", "--config", str(config), "--inline", *args],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_ETAG_TIMEOUT": "5",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
