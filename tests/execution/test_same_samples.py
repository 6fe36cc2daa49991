"""Samples do not hang on how they were made: inline, on Ray, or killed and resumed by the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mllm_shapx.cli"]
PATIENCE_S = 240.0


def config(folder: Path, name: str) -> Path:
    path = folder / f"{name}.json"
    content = {
        "base": str(ROOT / "configs/demo.json"),
        "experiment_set_id": "demo",
        "output_root": str(folder / name),
        "selection": {"filters": [{"column": "token_count", "op": "<=", "value": 7}]},
    }
    path.write_text(json.dumps(content))
    return path


def call(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def results(folder: Path) -> dict[str, Any]:
    """Return every sample and summary without its timings."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith("_result.json") or path.name == "aggregate_metrics.json":
            found[str(path.relative_to(folder))] = without_timings(json.loads(path.read_text()))
    return found


def without_timings(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without_timings(value) for key, value in data.items() if not key.startswith("runtime_")}
    return [without_timings(item) for item in data] if isinstance(data, list) else data


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inline_two_workers_and_a_killed_and_resumed_run_give_the_same_files(tmp_path: Path) -> None:
    inline = call("run", "--config", config(tmp_path, "inline"), "--inline")
    assert inline.returncode == 0, inline.stderr
    expected = results(tmp_path / "inline")
    assert len(expected) > 4 * 5

    two = call("run", "--config", config(tmp_path, "two"), "--num-workers", 2, "--json")
    assert two.returncode == 0, two.stderr
    assert results(tmp_path / "two") == expected
    outcome = json.loads(two.stdout)
    assert outcome["model_calls"] == sum(
        sample["model_calls"] for name, sample in expected.items() if name.endswith("_result.json")
    )

    killed = config(tmp_path, "killed")
    driver = subprocess.Popen(
        [*COMMAND, "run", "--config", str(killed), "--num-workers", "1"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE_S
    while len(list((tmp_path / "killed").rglob("*_result.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    refused = call("run", "--config", killed, "--inline")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    resumed = call("run", "--config", killed, "--inline", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert results(tmp_path / "killed") == expected
    verified = call("verify", tmp_path / "killed" / "demo")
    assert verified.returncode == 0, verified.stdout
