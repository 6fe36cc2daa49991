"""Studies on a real Slurm: one node, two nodes, the time limit, preemption, scancel, and job arrays."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import ROOT, VENV, SlurmCluster, needs_slurm
from small_study import MODEL, Sabotage, Study, results

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(400)]

SMALL_BATCHES = {
    "experiments": [{"explainer_type": "exact"}],
    "connector_kwargs": {"model_id": str(MODEL), "dtype": "float32", "batch_size": 8},
}
"""Four batches a row, for the saboteur to slow down."""


def study_in(folder: Path, name: str, rows: int) -> tuple[Study, Study]:
    """Return a study to disturb, and its undisturbed twin, which is complete."""
    study, twin = (
        Study(folder / place, rows=rows, settings=SMALL_BATCHES) for place in (name, f"{name}-twin")
    )
    assert twin.call("--inline").code == 0
    return study, twin


def until(what: Callable[[], bool], log: Path, timeout: float = 200.0) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, log.read_text(errors="replace") if log.exists() else "no log"
        time.sleep(0.25)


def script(cluster: SlurmCluster, study: Study, *options: str) -> Path:
    """Write the batch script of a study and return it."""
    words = ("slurm", "--config", "config.json", "--cpus-per-node", "2", "--venv", str(VENV), *options)
    file = study.folder / "job.sbatch"
    file.write_text(cluster.call("mllm-shapx", *words, cwd=study.folder))
    return file


def test_two_jobs_share_a_node_and_one_that_reaches_its_time_limit_goes_on() -> None:
    with SlurmCluster(nodes=1, cpus=4) as cluster:
        demo = cluster.folder / "demo"
        demo.mkdir()
        for name in ("configs", "demo", ".venv"):
            (demo / name).symlink_to(VENV if name == ".venv" else ROOT / name)
        study, twin = study_in(cluster.folder, "study", rows=16)
        saboteur = Sabotage(cluster.folder)
        saboteur.set(batch_s=1)
        file = script(cluster, study, "--time", "10", "--drain-before", "60")
        job = cluster.submit(str(file), cwd=study.folder, env=saboteur.env)
        other = cluster.submit(str(ROOT / "slurm" / "one_node.sbatch"), cwd=demo)
        log, other_log = study.folder / f"config-{job}.log", demo / f"demo-{other}.log"

        until(lambda: study.samples_on_disk() >= 2, log)
        minutes = _minutes(cluster.state(job)["RunTime"])
        cluster.call("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes + 1}")
        until(lambda: "SIGTERM: finishing the rows under way, for 15 s at most" in log.read_text(), log)
        assert study.samples_on_disk() < 16
        saboteur.set()
        until(lambda: "requeued; the next start goes on" in log.read_text(), log)
        ended = cluster.wait(job, log)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
        assert ended["Restarts"] == "1"
        assert results(study.output) == results(twin.output)

        ended = cluster.wait(other, other_log)
        assert ended["JobState"] == "COMPLETED", other_log.read_text()
        assert "demo: 96 of 96 samples" in other_log.read_text()


def test_a_preempted_job_on_two_nodes_goes_on_with_the_gpus_of_its_allocation() -> None:
    with SlurmCluster(nodes=2, cpus=2, gpus=2) as cluster:
        study, twin = study_in(cluster.folder, "study", rows=16)
        saboteur = Sabotage(cluster.folder)
        saboteur.set(batch_s=2)
        options = ("--nodes", "2", "--gpus-per-node", "1", "--run-options", "--num-gpus 2")
        file = script(cluster, study, "--time", "10", *options)
        job = cluster.submit(str(file), cwd=study.folder, env=saboteur.env)
        log = study.folder / f"config-{job}.log"
        until(lambda: study.samples_on_disk() >= 2 and "2/2 workers" in log.read_text(), log)

        urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
        until(lambda: "requeued; the next start goes on" in log.read_text(), log)
        saboteur.set()
        assert study.samples_on_disk() < 16
        ended = cluster.wait(job, log)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
        assert ended["Restarts"] == "1"
        assert cluster.state(urgent)["JobState"] == "COMPLETED"
        assert results(study.output) == results(twin.output)
        left = cluster.call("bash", "-c", "srun -N2 -n2 bash -c 'ls -d /tmp/shapx-[0-9]* 2> /dev/null; true'")
        assert not left.strip(), "Ray's folders are removed on both nodes"


def test_a_job_array_merged_equals_the_plain_run() -> None:
    with SlurmCluster(nodes=1, cpus=6, gpus=0) as cluster:
        study, twin = study_in(cluster.folder, "study", rows=4)
        file = script(cluster, study, "--time", "10", "--array", "3", "--run-options", "--inline")
        job = cluster.submit(str(file), cwd=study.folder)
        for index in range(3):
            log = study.folder / f"config-{job}_{index}.log"
            assert cluster.wait(f"{job}_{index}", log)["JobState"] == "COMPLETED", log.read_text()
        assert not study.samples_on_disk()
        said = cluster.call("mllm-shapx", "merge", str(study.output))
        assert "4 of 4 samples" in said
        assert results(study.output) == results(twin.output)


def test_an_array_element_that_reaches_its_time_limit_goes_on_and_the_others_are_left_alone() -> None:
    with SlurmCluster(nodes=1, cpus=4, gpus=0) as cluster:
        study, twin = study_in(cluster.folder, "study", rows=12)
        saboteur = Sabotage(cluster.folder)
        saboteur.set(batch_s=2)
        alone = "--inline --rows-in-flight 1 --grace 3"
        options = ("--array", "2", "--drain-before", "60", "--run-options", alone)
        file = script(cluster, study, "--time", "10", *options)
        job = cluster.submit(str(file), cwd=study.folder, env=saboteur.env)
        first, last = f"{job}_0", f"{job}_1"
        logs = {element: study.folder / f"config-{element}.log" for element in (first, last)}
        shards = {first: "0-of-2", last: "1-of-2"}

        def done(element: str) -> int:
            return len(list((study.output / "shards" / shards[element]).glob("*/samples/sample_*.json")))

        until(lambda: done(first) >= 1 and done(last) >= 1, logs[last])
        state = cluster.state(last)
        assert state["JobId"] == state["ArrayJobId"], "its SLURM_JOB_ID alone would name the whole array"
        cluster.call("scontrol", "update", f"jobid={last}", f"TimeLimit={_minutes(state['RunTime']) + 1}")
        until(lambda: "requeued; the next start goes on" in logs[last].read_text(), logs[last])
        cluster.call("scontrol", "update", f"jobid={last}", "TimeLimit=10")
        assert done(last) < 6
        saboteur.set()
        for element, restarts in ((first, "0"), (last, "1")):
            ended = cluster.wait(element, logs[element])
            assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), logs[element].read_text()
            assert ended["Restarts"] == restarts
        assert "SIGTERM" not in logs[first].read_text()
        cluster.call("mllm-shapx", "merge", str(study.output))
        assert results(study.output) == results(twin.output)


def test_a_cancelled_job_drains_is_not_requeued_and_goes_on_when_it_is_submitted_again() -> None:
    with SlurmCluster(nodes=1, cpus=2, gpus=0) as cluster:
        study, twin = study_in(cluster.folder, "study", rows=6)
        saboteur = Sabotage(cluster.folder)
        saboteur.set(batch_s=0.5)
        file = script(cluster, study, "--time", "10", "--run-options", "--inline --grace 5")
        job = cluster.submit(str(file), cwd=study.folder, env=saboteur.env)
        log = study.folder / f"config-{job}.log"
        until(lambda: study.samples_on_disk() >= 1, log)
        before = study.samples_on_disk()
        cluster.call("scancel", job)
        assert cluster.wait(job, log)["JobState"] == "CANCELLED"
        said = log.read_text()
        assert "SIGTERM: finishing the rows under way, for 5 s at most" in said
        assert "requeued" not in said
        assert before < study.samples_on_disk() < 6
        assert not (study.output / ".lock").exists()

        saboteur.set()
        again = cluster.submit(str(file), cwd=study.folder)
        ended = cluster.wait(again, log)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), log.read_text()
        assert cluster.state(job)["JobState"] == "CANCELLED"
        assert results(study.output) == results(twin.output)


def _minutes(run_time: str) -> int:
    hours, minutes, _ = run_time.rpartition("-")[2].split(":")
    return 60 * int(hours) + int(minutes)
