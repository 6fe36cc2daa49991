"""Measures many workers on one coordinator: time against the bound, and the coordinator's cost.

    python benchmarks/bench_many_workers.py                     # 64 workers, 200 mixed rows, batches of 2 s
    python benchmarks/bench_many_workers.py --workers 16 --seconds 0.5

The coordinator and the workers are real, in one process; the model only waits. One core does the Python work
of all workers, as they share an interpreter: batches must be long enough to leave it time. Without Ray:
`bench_coordinator.py` measures the coordinator as an actor.
"""

import asyncio
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate

import click
import numpy as np
from bench_spreading import QUEUE, SleepingModel, write_config

from mllm_shapx.config.loading import load_config
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import open_output, prepare
from mllm_shapx.execution.worker import BEAT_S, Worker

SPARE_THREADS = 16
"""Threads beyond one per worker; every worker's engine has two more."""


class CountingModel(SleepingModel):
    """Counts its batches, and records the first start and the last end."""

    def __init__(self, batch_size: int, seconds: float) -> None:
        super().__init__(batch_size, seconds)
        self.seconds = seconds
        self.batches = 0
        self.first_at = self.last_at = 0.0

    def note(self, started: float, ended: float, prompts: int) -> None:
        """Count a batch."""
        del prompts
        self.first_at = self.first_at or started
        self.last_at = ended
        self.batches += 1


@dataclass
class Calls:
    """Number of calls of a coordinator's method, and their total CPU time."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class MeasuringDesk:
    """The connection to the coordinator; measures every call."""

    coordinator: Coordinator
    calls: defaultdict[str, Calls] = field(default_factory=lambda: defaultdict(Calls))

    async def call[**P, R](
        self, method: Callable[Concatenate[Coordinator, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See `Desk.call`."""
        started = time.thread_time()
        try:
            return method(self.coordinator, *args, **kwargs)
        finally:
            calls = self.calls[method.__name__]
            calls.count += 1
            calls.seconds += time.thread_time() - started


async def _work(study: Study, desk: MeasuringDesk, models: Sequence[CountingModel]) -> tuple[float, float]:
    """Let one worker per model explain the study; return the time when all were ready, and the end."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(len(models) + SPARE_THREADS))
    started: list[float] = []
    all_ready = threading.Barrier(len(models), lambda: started.append(time.time()))

    def load(model: CountingModel) -> Callable[[Study], CountingModel]:
        def wait_for_the_others(_: Study) -> CountingModel:
            all_ready.wait()
            return model

        return wait_for_the_others

    async with asyncio.TaskGroup() as group:
        for number, model in enumerate(models):
            group.create_task(Worker(f"worker-{number}", study, desk, load(model)).run())
        while not desk.coordinator.state().finished:  # noqa: ASYNC110 -- no event
            await asyncio.sleep(0.1)
        return started[0], time.time()


@click.command()
@click.option("--workers", type=int, default=64, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Time of a batch, however full.")
@click.option("--rows", type=int, help="Rows of equal length, instead of 200 mixed ones.")
@click.option("--players", type=int, default=8, show_default=True, help="Players of each of them.")
def main(workers: int, batch_size: int, seconds: float, rows: int | None, players: int) -> None:
    """Measure many workers on one coordinator."""
    queue = QUEUE if rows is None else (players,) * rows
    with tempfile.TemporaryDirectory(prefix="shapx-workers-") as folder:
        loaded = load_config(write_config(Path(folder), queue))
        options = RunOptions()
        study, _ = prepare(loaded, options)
        output = open_output(study)
        desk = MeasuringDesk(Coordinator(study, output.inspections))
        models = [CountingModel(batch_size, seconds) for _ in range(workers)]
        processor = time.process_time()
        started, ended = asyncio.run(_work(study, desk, models))
        processor = time.process_time() - processor
        output.lock.release()
        _show(desk, models, (started, ended), processor, sum(1 << n for n in queue) / batch_size)


def _show(
    desk: MeasuringDesk,
    models: Sequence[CountingModel],
    span: tuple[float, float],
    processor: float,
    fewest: float,
) -> None:
    started, ended = span
    batches, workers, seconds, wall = (
        sum(m.batches for m in models),
        len(models),
        models[0].seconds,
        ended - started,
    )
    spent = sum(calls.seconds for calls in desk.calls.values())
    before = np.mean([model.first_at - started for model in models if model.batches])
    after = np.mean([ended - model.last_at for model in models if model.batches])
    click.echo(f"{workers} workers, {batches} batches of {seconds:g} s ({fewest:.0f} if all were full)")
    click.echo(f"wall {wall:.1f} s, batch time / workers {batches * seconds / workers:.1f} s")
    click.echo(f"efficiency {batches * seconds / workers / wall:.3f} of the bound")
    click.echo(
        f"idle before the first batch {before:.1f} s, after the last one {after:.1f} s, mean over workers"
    )
    click.echo(
        f"processor time {processor:.1f} s, coordinator {spent:.2f} s ({spent / wall:.1%} of the wall)"
    )
    for name, calls in sorted(desk.calls.items(), key=lambda item: -item[1].seconds):
        each = calls.seconds / calls.count * 1e6
        click.echo(f"  {name:<9} {calls.count:>7} calls {calls.seconds:>7.2f} s {each:>7.0f} us each")
    beats = desk.calls["beat"]
    if beats.count:
        share = beats.seconds / beats.count / BEAT_S
        click.echo(f"heartbeats alone fill one core at {1 / share:,.0f} workers")


if __name__ == "__main__":
    main()
