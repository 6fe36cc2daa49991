"""Whatever the number of workers, and whoever is stopped or killed on the way, the results are the same."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import LoopbackCluster
from small_study import Sabotage, Study, results

from mllm_shapx.records.pace import read_pace
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore

ACTORS = "ray::CoordinatorActor", "ray::AggregatorActor", "ray::WorkerActor"
ROWS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def saboteur(tmp_path_factory: pytest.TempPathFactory) -> Sabotage:
    """What breaks in the workers of `cluster`: nothing until a test says so."""
    return Sabotage(tmp_path_factory.mktemp("sabotage"))


@pytest.fixture(scope="module")
def cluster(saboteur: Sabotage) -> Iterator[LoopbackCluster]:
    """Return a cluster with four logical GPUs; starting one takes long, so the tests share it."""
    with LoopbackCluster(cpus=4, gpus=4, env=saboteur.env) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same study, done without Ray."""
    study = Study(tmp_path_factory.mktemp("undisturbed"), rows=ROWS, words=6)
    assert study.call("--inline").code == 0
    return study


def actors(cluster: LoopbackCluster, *names: str) -> list[psutil.Process]:
    return [process for name in names for process in cluster.processes(name)]


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until `what()` holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_four_two_and_one_worker_stopped_killed_and_resumed_give_what_one_process_gives(
    cluster: LoopbackCluster, saboteur: Sabotage, undisturbed: Study, tmp_path: Path
) -> None:
    """Four GPU actors until SIGTERM, two workers until the driver's SIGKILL, one for the rest."""
    study = Study(tmp_path, rows=ROWS, words=6, env=cluster.env)
    to_cluster = ("--address", cluster.address, "--flush-every", "0.3")
    # So slow that the first worker is not through before the fourth has loaded.
    saboteur.set(slow=list(range(ROWS)), slow_s=10.0)

    first = study.start("--num-gpus", "all", "--rows-in-flight", "2", *to_cluster)
    first.wait_for(lambda: len(actors(cluster, "ray::WorkerActor")) == 4)
    first.wait_for(lambda: "4/4 workers busy" in first.out)
    first.wait_for(lambda: study.samples_on_disk() >= 6)
    first.kill(15)
    ended = first.wait()
    assert ended.code == 143, ended.out
    assert "SIGTERM: finishing the rows under way" in ended.out
    assert f"to go on: mllm-shapx run --config {study.config} --resume" in ended.out
    done = study.samples_on_disk()
    assert 6 <= done < 3 * ROWS
    pace = read_pace(open_storage(str(study.output)))
    assert pace is not None, "what answers cost is left behind for `plan`"
    assert pace.workers == 4
    until(lambda: not actors(cluster, *ACTORS))

    saboteur.set(slow=list(range(ROWS)), slow_s=1.0)
    second = study.start("--num-workers", "2", "--num-gpus", "0", "--resume", *to_cluster)
    second.wait_for(lambda: study.samples_on_disk() >= done + 6)
    second.kill()
    second.wait()
    until(lambda: not actors(cluster, *ACTORS))

    saboteur.set()
    last = study.run("--num-workers", "1", "--num-gpus", "0", "--resume", *to_cluster)
    assert last.code == 0, last.out
    assert "took over the lock of process" in last.out
    assert results(study.output) == results(undisturbed.output)
    assert study.call(verb="verify").code == 0
    assert cluster.nodes_asked() is None, "there is no autoscaler that could be asked"


def test_two_workers_share_a_gpu_and_a_failing_row_costs_nobody_else(
    cluster: LoopbackCluster, saboteur: Sabotage, undisturbed: Study, tmp_path: Path
) -> None:
    """--workers-per-gpu and --gpus-per-worker; a row that raises is given up, the others are done."""
    study = Study(tmp_path, rows=ROWS, words=6, env=cluster.env)
    saboteur.set(**{"raise": [5], "slow": list(range(ROWS)), "slow_s": 0.5})
    run = study.start("--num-gpus", "1", "--workers-per-gpu", "2", "--address", cluster.address)
    run.wait_for(lambda: len(actors(cluster, "ray::WorkerActor")) == 2)
    ended = run.wait()
    assert ended.code == 3, ended.out
    assert "2 workers busy" in ended.out
    failed = study.call(verb="failures")
    assert "ArithmeticError" in failed.out
    assert "the row is poisoned" in failed.out
    # Long enough for a line of progress that shows the worker.
    saboteur.set(slow=list(range(ROWS)), slow_s=7.0)
    again = study.start(
        "--num-gpus", "2", "--gpus-per-worker", "2", "--address", cluster.address, verb="retry"
    )
    ended = again.wait()
    assert ended.code == 0, ended.out
    assert "1/1 workers" in ended.out, "one worker has both GPUs"
    assert results(study.output) == results(undisturbed.output)


def test_more_workers_than_gpus_are_refused(cluster: LoopbackCluster, tmp_path: Path) -> None:
    study = Study(tmp_path, rows=2, env=cluster.env)
    for args, words in (
        (("--num-gpus", "5"), "asks for more GPUs than there are: the cluster has 4"),
        (("--num-gpus", "2", "--num-workers", "3"), "need 3 GPUs, and 2 may be used"),
        (("--num-gpus", "1", "--gpus-per-worker", "2"), "is more than the 1 GPU(s) to use"),
    ):
        ended = study.run("--address", cluster.address, *args)
        assert ended.code == 2
        assert words in ended.out
    assert not study.output.exists()


def title(process: psutil.Process) -> str:
    """Return a process's title; empty when it has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def test_poison_is_quarantined_with_its_traces_and_retried_alone(undisturbed: Study, tmp_path: Path) -> None:
    """On a cluster of its own: a row kills its process every time, one raises, one stops its worker once."""
    saboteur = Sabotage(tmp_path)
    study = Study(tmp_path, rows=ROWS, words=6, env=saboteur.env)
    slow = {"slow": list(range(ROWS)), "slow_s": 0.2}
    saboteur.set(**{"die": [3], "raise": [5], "hang": [7], "once": str(tmp_path), **slow})
    ended = study.run("--num-workers", "2", "--stall-timeout", "10", timeout=400)
    assert ended.code == 3, ended.out
    assert "has shown no progress for 10 s; it is replaced" in ended.out
    assert "mllm-shapx failures" in ended.out
    assert study.samples_on_disk() == 3 * (ROWS - 2)
    failed = {failure["row"]: failure for failure in failures_of(study)}
    assert set(failed) == {3, 5}
    assert (failed[3]["reason"], failed[3]["attempts"]) == ("worker_died", 3)
    assert failed[3]["worker"].startswith("worker-")
    assert "the poison takes effect" in failed[3]["log_tail"]
    assert (failed[5]["reason"], failed[5]["attempts"]) == ("ArithmeticError", 3)
    assert "in _raise" in failed[5]["traceback"]

    saboteur.set()
    before = results(study.output)
    ended = study.call("--inline", "--only", "worker_died", verb="retry")
    assert ended.code == 3, "the other one is still there"
    ended = study.call("--inline", verb="retry")
    assert ended.code == 0, ended.out
    after = results(study.output)
    samples = {path for path in before if "/samples/" in path}
    assert {path: before[path] for path in samples} == {path: after[path] for path in samples}
    assert after == results(undisturbed.output)


def failures_of(study: Study) -> list[dict[str, Any]]:
    """Return one failure of each row, from the files."""
    found = {}
    for path in sorted(study.output.glob("*/failures/*.json")):
        data = json.loads(path.read_text())
        found[data["row_index"]] = {**data, "row": data["row_index"]}
    return list(found.values())


def test_no_process_outlives_a_killed_driver_of_its_own_cluster_and_ctrl_c_drains(
    undisturbed: Study, tmp_path: Path
) -> None:
    """Ctrl-C goes to the whole group, Ray's processes too; partial answers of long rows are kept."""
    saboteur = Sabotage(tmp_path)
    study = Study(tmp_path, rows=ROWS, words=6, env=saboteur.env)
    saboteur.set(slow=list(range(ROWS)), slow_s=1.0)
    run = study.start("--num-workers", "1", "--flush-every", "0.2")
    run.wait_for(lambda: study.samples_on_disk() >= 3)
    family = psutil.Process(run.pid).children(recursive=True)
    assert any("ray::WorkerActor" in title(process) for process in family)
    holders = [process for process in family if not title(process).endswith("Agent")]
    run.kill()
    run.wait()
    # Ray's agents, which hold nothing, look for their node for a minute or two before they end.
    _, alive = psutil.wait_procs(holders, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    run = study.start("--num-workers", "1", "--resume")
    done = study.samples_on_disk()
    run.wait_for(lambda: study.samples_on_disk() >= done + 3)
    run.kill_group(2)
    ended = run.wait()
    assert ended.code == 130, ended.out
    assert "--resume" in ended.out
    saboteur.set()
    assert study.call("--inline", "--resume").code == 0
    assert results(study.output) == results(undisturbed.output)
    stored = CoalitionStore(open_storage(str(study.output))).info()
    expected = CoalitionStore(open_storage(str(undisturbed.output))).info()
    assert [(entry.row_index, entry.answers) for entry in stored] == [
        (entry.row_index, entry.answers) for entry in expected
    ]
