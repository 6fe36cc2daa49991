"""Measures the coordinator's cost: synthetic units through the real actor, with instant workers.

    python benchmarks/bench_coordinator.py --units 10000 100000

For each size, a coordinator actor on a new Ray cluster writes a study of that many rows and one run. Its
state is read twice a second, as by the driver. Printed are units per second, in total and for the first and
last tenth (a completion must cost the same for any number of units); the coordinator's memory before the
first unit and after the last; the time from SIGKILL until a restarted coordinator hands out a unit; and the
time of `--resume` until then: reading all finished samples and writing every checkpoint.
"""

import argparse
import asyncio
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 4
IN_FLIGHT = 2
ANSWERS = 64
"""Answers of each sample: an exact game of six players."""
PLAYERS = 6


@dataclass(frozen=True)
class Measured:
    """The results of one size."""

    units: int
    seconds: float
    first_tenth_per_s: float
    last_tenth_per_s: float
    rss_before: int
    rss_after: int
    restart_s: float
    resume_s: float

    def row(self) -> str:
        """Return a line of the table."""
        mib = 1 << 20
        return (
            f"{self.units:>9,} {self.units / self.seconds:>9.0f} {self.first_tenth_per_s:>12.0f} "
            f"{self.last_tenth_per_s:>11.0f} {self.rss_before / mib:>11.0f} {self.rss_after / mib:>10.0f} "
            f"{self.restart_s:>10.1f} {self.resume_s:>9.1f}"
        )


HEAD = (
    f"{'units':>9} {'units/s':>9} {'first tenth':>12} {'last tenth':>11} {'MiB before':>11} "
    f"{'MiB after':>10} {'restart s':>10} {'resume s':>9}"
)


class InstantWorker:
    """A worker towards the coordinator; has every answer at once."""

    def __init__(self, worker: str, coordinator: Any) -> None:
        from mllm_shapx.execution.actors import ActorDesk
        from mllm_shapx.execution.messages import WorkerInfo

        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import results_on_disk  # noqa: F401 -- before the clock starts

        self._me = WorkerInfo(worker, "here", os.getpid(), "cpu", "float32")
        self._desk = ActorDesk(coordinator)
        self._held: set[str] = set()
        self._asking = asyncio.Lock()
        self._done_at: list[float] = []

    async def run(self) -> list[float]:
        """Take units until none is left; return the end of each, in seconds of `time.time`."""
        await asyncio.gather(*(self._work() for _ in range(IN_FLIGHT)))
        return self._done_at

    async def first_lease(self) -> float:
        """Ask until there is a unit; return its time."""
        from mllm_shapx.execution.coordinator import Coordinator

        while (await self._desk.call(Coordinator.lease, self._me, ())).lease is None:  # noqa: ASYNC110 -- no event
            await asyncio.sleep(0.05)
        return time.time()

    async def _work(self) -> None:
        from results_on_disk import make_sample

        from mllm_shapx.execution.coordinator import Coordinator

        while True:
            async with self._asking:
                lease = (await self._desk.call(Coordinator.lease, self._me, tuple(self._held))).lease
                if lease is not None:
                    self._held.add(lease.unit.unit_id)
            if lease is None:
                if not self._held:
                    return
                await asyncio.sleep(0.05)
                continue
            for name in lease.unit.run_names:
                sample = make_sample(name, lease.unit.row_index, players=PLAYERS)
                await self._desk.call(
                    Coordinator.report, self._me, lease.unit.unit_id, sample, _answers(name)
                )
            self._held.discard(lease.unit.unit_id)
            self._done_at.append(time.time())


def _answers(run_name: str) -> Any:
    from mllm_shapx.execution.messages import Answers
    from mllm_shapx.models.base import Answer

    by_mask = {
        mask: Answer(f"bright beams warn passing boats {mask}", tuple(range(10)), asked_by=run_name)
        for mask in range(ANSWERS)
    }
    return Answers(by_mask, "conversation", PLAYERS)


def _study(folder: Path, units: int) -> Any:
    """Return a study of `units` rows that are never read."""
    from mllm_shapx.config.loading import load_config
    from mllm_shapx.execution.messages import Study
    from mllm_shapx.models.identity import Version
    from mllm_shapx.planning.sweep import expand

    config = folder / "config.json"
    settings = {
        "experiment_set_id": "bench",
        "connector": "hf_text",
        "dataset": {"source": "local_parquet", "path": "rows.parquet"},
        "generation": {"text_temperature": 0.0},
        "wandb": {"enabled": False},
        "experiments": [{"explainer_type": "exact"}],
    }
    config.write_text(json.dumps(settings))
    loaded = load_config(config)
    settings_of = loaded.experiment_set
    return Study(
        experiment_set_id="bench",
        output_uri=str(folder / "bench"),
        runs=expand(settings_of).runs,
        rows=tuple(range(units)),
        players=dict.fromkeys(range(units), PLAYERS),
        config_path=config,
        dataset=settings_of.dataset,
        dataset_commit="0",  # as of a hub: content at a commit is not compared
        model_path=None,
        model_version=Version("model_id", (), "0"),
        runtime=settings_of.runtime,
        config={**loaded.data, "selection": settings_of.selection.model_dump(mode="json")},
    )


class _Cluster:
    """The coordinator's actor over one study's directory, with the actors that it needs."""

    def __init__(self, folder: Path, study: Any, inspections: Mapping[str, Any], name: str) -> None:
        import ray

        from mllm_shapx.execution.actors import NAMESPACE, CoordinatorActor, Shared

        class Nobody:
            def log(self, sample: Any) -> None:
                """Take a sample, like the aggregator."""

        shared = folder / f"{name}.pickle"
        shared.write_bytes(pickle.dumps(Shared(study, dict(inspections), {}, {})))
        self._aggregator = ray.remote(Nobody).options(name=name, namespace=NAMESPACE, num_cpus=0).remote()
        self.coordinator = (
            ray.remote(CoordinatorActor)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=0)
            .remote(str(shared), name)
        )
        self.pid = int(ray.get(self.coordinator.__ray_call__.remote(lambda _: os.getpid())))

    def worker(self, name: str) -> Any:
        """Start a worker."""
        import ray

        return ray.remote(InstantWorker).options(num_cpus=0).remote(name, self.coordinator)

    def rss(self) -> int:
        """Return the coordinator's resident memory in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def end(self) -> None:
        """End the actors."""
        import ray

        ray.kill(self.coordinator)
        ray.kill(self._aggregator)


def measure(folder: Path, units: int) -> Measured:
    """Measure one size in `folder`."""
    import ray

    from mllm_shapx.execution.options import RunOptions
    from mllm_shapx.execution.preparation import open_output

    study = _study(folder, units)
    output = open_output(study)
    output.lock.release()
    cluster = _Cluster(folder, study, output.inspections, "first")
    workers = [cluster.worker(f"worker-{number}") for number in range(WORKERS)]
    ray.get([worker.__ray_ready__.remote() for worker in workers])
    rss_before = cluster.rss()
    started = time.time()
    runs = [worker.run.remote() for worker in workers]
    while len(ray.wait(runs, num_returns=len(runs), timeout=0.5)[0]) < len(runs):
        ray.get(cluster.coordinator.state.remote())
    done = sorted(moment for run in runs for moment in ray.get(run))
    if len(done) != units:
        raise SystemExit(f"{len(done)} units were done, not {units}")
    tenth = units // 10
    ray.get(cluster.coordinator.finish.remote())
    rss_after = cluster.rss()
    cluster.end()
    options = RunOptions(resume=True)
    one_more = replace(study, rows=tuple(range(units + 1)), players=None, options=options)
    begun = time.time()
    output = open_output(one_more)
    output.lock.release()
    cluster = _Cluster(folder, one_more, output.inspections, "second")
    resumed = ray.get(cluster.worker("worker-8").first_lease.remote()) - begun
    late = cluster.worker("worker-9")
    ray.get(late.__ray_ready__.remote())
    psutil.Process(cluster.pid).kill()
    killed = time.time()
    restarted = ray.get(late.first_lease.remote()) - killed
    cluster.end()
    return Measured(
        units=units,
        seconds=done[-1] - started,
        first_tenth_per_s=tenth / (done[tenth - 1] - started),
        last_tenth_per_s=tenth / (done[-1] - done[-tenth - 1]),
        rss_before=rss_before,
        rss_after=rss_after,
        restart_s=restarted,
        resume_s=resumed,
    )


def main() -> None:
    """Read the options, measure each size, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--units", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where the results are written; a temporary folder")
    options = parser.parse_args()
    from mllm_shapx.execution.cluster import connected
    from mllm_shapx.execution.options import RunOptions

    print(f"{WORKERS} workers, {ANSWERS} answers with each sample, on {os.cpu_count()} CPUs", HEAD, sep="\n")
    with connected(RunOptions(address="local")):
        for units in options.units:
            with tempfile.TemporaryDirectory(prefix="mllm-shapx-bench-", dir=options.folder) as folder:
                print(measure(Path(folder), units).row(), flush=True)


if __name__ == "__main__":
    main()
