"""A study as a Ray job: `ray job stop` leaves its driver three seconds, and nothing is lost."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_cluster import LoopbackCluster
from small_study import LONG_PROMPTS, Sabotage, Study, environment, results

RAY = str(Path(sys.executable).with_name("ray"))
ANSWERED = re.compile(r" [1-9]\d*/[\d,]+ coalitions")


def ray_job(cluster: LoopbackCluster, *args: str) -> str:
    """Run `ray job ARGS` and return what it says."""
    address = f"http://127.0.0.1:{cluster.dashboard_port}"
    verb, *rest = args
    done = subprocess.run(
        [RAY, "job", verb, "--address", address, *rest],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(cluster.env),
    )
    said = done.stdout + done.stderr
    if "No available agent" in said:  # of a cluster that has just started
        time.sleep(2)
        return ray_job(cluster, *args)
    assert done.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_job_keeps_its_answers_and_goes_on_elsewhere(tmp_path: Path) -> None:
    """What the rows under way had of answers is on disk, and the resumed study equals an undisturbed one."""
    one_run = {"experiments": [{"explainer_type": "exact"}]}
    undisturbed = Study(tmp_path / "undisturbed", settings=one_run)
    study = Study(tmp_path / "job", settings=one_run)
    for each in (undisturbed, study):
        each.write_prompts(*LONG_PROMPTS)
    saboteur = Sabotage(tmp_path)
    saboteur.set(batch_s=2)
    with LoopbackCluster(cpus=2, dashboard=True, env=saboteur.env) as cluster:
        command = [sys.executable, "-m", "mllm_shapx.cli", "run", "--config", str(study.config)]
        ray_job(cluster, "submit", "--no-wait", "--submission-id", "study", "--", *command)
        deadline = time.monotonic() + 240
        while not ANSWERED.search(ray_job(cluster, "logs", "study")):
            assert time.monotonic() < deadline
        assert not parts(study), "nothing is flushed in the first 30 s"
        refused = submit_with_a_relative_output(cluster, study, tmp_path / "uploaded")
        ray_job(cluster, "stop", "study")
        log = ray_job(cluster, "logs", "study")
    assert "SIGTERM: finishing the rows under way, for 3 s at most" in log
    assert f"to go on: mllm-shapx run --config {study.config} --resume" in log
    assert "output_root is a relative path, which in this Ray job means" in refused
    assert "Name an absolute path" in refused
    assert study.samples_on_disk() < 2
    assert parts(study), "what was answered was flushed in the time that was left"
    assert study.call("--inline", "--resume").code == 0
    assert undisturbed.call("--inline").code == 0
    assert results(study.output) == results(undisturbed.output)


def submit_with_a_relative_output(cluster: LoopbackCluster, study: Study, folder: Path) -> str:
    """Submit a job whose working directory Ray copies, and return what it says; it is refused."""
    folder.mkdir()
    config = json.loads(study.config.read_text())
    (folder / "config.json").write_text(json.dumps({**config, "output_root": "output"}))
    address = f"http://127.0.0.1:{cluster.dashboard_port}"
    command = [sys.executable, "-m", "mllm_shapx.cli", "run", "--config", "config.json"]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", str(folder), "--", *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(cluster.env),
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def parts(study: Study) -> list[Path]:
    return list(study.output.glob("generations/*.parts/*.parquet"))
