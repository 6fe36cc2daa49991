"""Measures the spread of work over workers: real driver, coordinator and workers, a model that only waits.

    python benchmarks/bench_spreading.py             # one heavy row on 1, 2 and 4 workers; a mixed queue on 8
    python benchmarks/bench_spreading.py --case queue --seconds 0.4

A batch always takes the same time, so a machine with two cores can replace one with eight GPUs. But it needs
enough CPU time: rendering, scoring and messages cost a few tenths of a millisecond per coalition. Time counts
from the moment when all workers are ready until the last sample is on disk.
"""

import json
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.config.loading import load_config
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.run import run_config
from mllm_shapx.models.base import Answer, Decoding, ModelIdentity, ModelReport
from mllm_shapx.reporting.progress import ProgressReporter
from mllm_shapx.reporting.study_progress import StudyProgress

DEMO = Path(__file__).parents[1] / "configs" / "demo.json"
HEAVY_ROW = (14,)
"""Players of the heavy row: 2^14 coalitions."""
QUEUE = (
    (14, 12) + (11,) * 2 + (10,) * 4 + (9,) * 8 + (8,) * 12 + (7,) * 20 + (6,) * 31 + (5,) * 50 + (4,) * 71
)
"""Players of 200 rows whose costs span three orders of magnitude."""


@dataclass(frozen=True)
class Pace:
    """Settings of the waiting model, and the folder where its processes meet."""

    folder: str
    workers: int
    batch_size: int
    seconds: float
    """Time of a batch, however full."""


@dataclass(frozen=True)
class WaitingPrompt:
    """A prompt of text only."""

    text: str

    @property
    def length(self) -> int:
        """Return the number of words."""
        return len(self.text.split())


class SleepingModel:
    """Sleeps instead of computing.

    Args:
        batch_size: Maximum prompts per batch.
        seconds: Time of a batch, however full.
    """

    identity = ModelIdentity("none", "waits", None, "float32", "cpu")
    report = ModelReport()

    def __init__(self, batch_size: int, seconds: float) -> None:
        self.max_batch_size = batch_size
        self._seconds = seconds

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> WaitingPrompt:
        """Return the user's words."""
        del decoding
        words = (message.text for message in snapshot.messages() if message.role.value == "user")
        return WaitingPrompt(" ".join(words))

    def answer(
        self, prompts: Sequence[WaitingPrompt], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Answer]:
        """Wait; then return a few words that depend on the prompt."""
        del decoding, seeds
        started = time.time()
        time.sleep(self._seconds)
        self.note(started, time.time(), len(prompts))
        return [Answer(_said(prompt.text)) for prompt in prompts]

    def embed(self, answers: Sequence[Answer], mode: str, reducer: str) -> list[NDArray[np.float64]]:
        """Do nothing: the similarity reads texts."""
        del mode, reducer
        return [np.zeros(0) for _ in answers]

    def note(self, started: float, ended: float, prompts: int) -> None:
        """Record a batch: seconds since 1970, and its number of prompts."""

    def close(self) -> None:
        """Do nothing."""


class WaitingModel(SleepingModel):
    """Writes its batches into a file, and starts when the models of all workers are ready."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace.batch_size, pace.seconds)
        self._pace = pace
        self._log = Path(pace.folder, f"batches-{os.getpid()}").open("w", buffering=1)  # noqa: SIM115
        self._meet()

    def note(self, started: float, ended: float, prompts: int) -> None:
        """Write a line."""
        self._log.write(f"{started} {ended} {prompts}\n")

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def _meet(self) -> None:
        """Wait until the processes of all workers are ready."""
        folder = Path(self._pace.folder)
        while len(list(folder.glob("batches-*"))) < self._pace.workers:
            time.sleep(0.02)
        # The first process to see it sets the start for all.
        start = folder / "start"
        try:
            with start.open("x") as file:
                file.write(str(time.time() + 0.5))
        except FileExistsError:
            pass
        while not (moment := start.read_text()):
            time.sleep(0.01)
        time.sleep(max(0.0, float(moment) - time.time()))


def _waiting_model(pace: Pace, _: Study) -> WaitingModel:
    return WaitingModel(pace)


def _said(text: str) -> str:
    digest = zlib.crc32(text.encode())
    return " ".join(f"say{digest >> shift & 7}" for shift in (0, 3, 6, 9))


class Recorder(ProgressReporter):
    """Records the user's estimates."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, StudyProgress]] = []
        self.messages: list[str] = []

    def update(self, progress: StudyProgress) -> None:
        """Record them with the time."""
        self.seen.append((time.time(), progress))

    def message(self, text: str) -> None:
        """Keep a message."""
        self.messages.append(text)

    def close(self) -> None:
        """Keep everything."""


@dataclass(frozen=True)
class Outcome:
    """The figures of one study of the benchmark."""

    workers: int
    coalitions: int
    wall: float
    """Seconds from the common start to the last sample."""
    to_the_end: float
    """The same until the driver returns: with summaries and shutdown."""
    batches: int
    busy: float
    """Total seconds of all batches."""
    fewest: int
    """Number of batches if all had been full."""
    idle_before: float
    """Seconds before their first batch, mean over workers."""
    idle_after: float
    """Seconds after their last batch, mean over workers."""
    helped: int
    """Workers that answered anything."""
    tenth: float | None
    """Shown / true seconds left, after a tenth of the work."""
    worst: float | None
    """Maximum |shown / true - 1| from a tenth to nine tenths of the work."""

    @property
    def bound(self) -> float:
        """Return the wall time without any waiting of workers."""
        return self.busy / self.workers


def measure(players: Sequence[int], workers: int, batch_size: int, seconds: float) -> Outcome:
    """Explain rows of `players` players with an exact run on `workers` workers."""
    with tempfile.TemporaryDirectory(prefix="shapx-spreading-") as folder:
        pace = Pace(folder, workers, batch_size, seconds)
        recorder = Recorder()
        config = write_config(Path(folder), players)
        options = RunOptions(num_workers=workers)
        load = partial(_waiting_model, pace)
        outcome = run_config(load_config(config), options, recorder, inline=False, load=load)
        ended = time.time()
        if outcome.exit_code:
            raise click.ClickException("\n".join(recorder.messages))
        return _outcome(Path(folder), recorder, workers, batch_size, ended)


def write_config(folder: Path, players: Sequence[int]) -> Path:
    """Write a config of rows of `players` players; return its path."""
    order = np.random.default_rng(0).permutation(len(players))
    prompts = [" ".join(f"row{row}word{place}" for place in range(players[row])) for row in order]
    pq.write_table(pa.table({"prompt": prompts}), folder / "rows.parquet")
    path = folder / "config.json"
    config = {
        "base": str(DEMO),
        "experiment_set_id": "spreading",
        "output_root": str(folder / "out"),
        "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
        "experiments": [{"explainer_type": "exact"}],
    }
    path.write_text(json.dumps(config))
    return path


def _outcome(folder: Path, recorder: Recorder, workers: int, batch_size: int, ended: float) -> Outcome:
    start = float((folder / "start").read_text())
    finish = max(path.stat().st_mtime for path in folder.glob("out/*/*/samples/*.json"))
    logs = [
        [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
        for path in folder.glob("batches-*")
    ]
    batches = [batch for log in logs for batch in log]
    coalitions = round(sum(batch[2] for batch in batches))
    shown = [
        (progress.eta_s / (finish - at), progress.coalitions_done / progress.coalitions_total)
        for at, progress in recorder.seen
        if progress.eta_s is not None and at < finish
    ]
    ratios = [ratio for ratio, share in shown if 0.1 <= share <= 0.9]
    return Outcome(
        workers=workers,
        coalitions=coalitions,
        wall=finish - start,
        to_the_end=ended - start,
        batches=len(batches),
        busy=sum(batch[1] - batch[0] for batch in batches),
        fewest=-(-coalitions // batch_size),
        idle_before=float(np.mean([log[0][0] - start for log in logs if log])),
        idle_after=float(np.mean([finish - log[-1][1] for log in logs if log])),
        helped=sum(bool(log) for log in logs),
        tenth=ratios[0] if ratios else None,
        worst=max((abs(ratio - 1.0) for ratio in ratios), default=None),
    )


def _show(name: str, outcome: Outcome, alone: Outcome | None) -> None:
    speedup = "" if alone is None else f"{alone.wall / outcome.wall / outcome.workers:6.3f}"
    tenth = "-" if outcome.tenth is None else f"{outcome.tenth:.2f}"
    worst = "-" if outcome.worst is None else f"{outcome.worst:.0%}"
    cells = (
        f"{name:>6} {outcome.workers:>7} {outcome.helped:>4} {outcome.coalitions:>10,}",
        f"{outcome.batches:>7} {outcome.fewest:>6} {outcome.bound:>7.2f} {outcome.wall:>7.2f}",
        f"{outcome.wall / outcome.bound:>6.3f} {speedup:>6} {outcome.idle_before:>6.2f}",
        f"{outcome.idle_after:>6.2f} {outcome.to_the_end:>6.2f} {tenth:>6} {worst:>6}",
        f"{os.getloadavg()[0]:>5.1f}",
    )
    click.echo(" ".join(cells))


HEAD = """\
  case workers used coalitions batches fewest bound_s  wall_s    w/b linear before  after  end_s  tenth  worst  load
bound: batch time / workers. linear: speed-up over one worker / workers. before, after: seconds without work,
mean over workers. end: until the driver returned. tenth: time left as shown after a tenth of the work / truth.
worst: its largest error from a tenth to nine tenths. load: of the machine, at the end."""  # noqa: E501


@click.command()
@click.option("--case", type=click.Choice(["row", "queue", "all"]), default="all")
@click.option("--seconds", type=float, help="Time of a batch; default 0.25 (row), 0.2 (queue).")
@click.option("--workers", type=int, multiple=True, help="Workers; default 1, 2, 4 (row), 8 (queue).")
@click.option("--rounds", type=int, default=1, help="How often to measure.")
def main(case: str, seconds: float | None, workers: tuple[int, ...], rounds: int) -> None:
    """Measure how evenly a heavy row, or a queue of mixed rows, spreads over workers."""
    click.echo(HEAD)
    for _ in range(rounds):
        if case in {"row", "all"}:
            alone: Outcome | None = None
            for count in workers or (1, 2, 4):
                outcome = measure(HEAVY_ROW, count, 64, seconds or 0.25)
                alone = outcome if count == 1 else alone
                _show("row", outcome, alone)
        if case in {"queue", "all"}:
            for count in workers or (8,):
                _show("queue", measure(QUEUE, count, 16, seconds or 0.2), None)


if __name__ == "__main__":
    main()
