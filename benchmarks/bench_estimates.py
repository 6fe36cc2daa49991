"""Measures the accuracy of the time left in the progress line and in `plan` while a study runs.

    python benchmarks/bench_estimates.py                  # studies of a minute and of several, in one process
    python benchmarks/bench_estimates.py --workers 2 --rows 24

The studies are real: a random Llama answers, rows have 4 to 11 words, exact and sampling explainers share
answers, and some runs generate three times as many tokens. `plan` reads the files of the running study, as
from another terminal. Then the study runs again and is stopped after a tenth, as by Ctrl-C; `plan` estimates
the remaining time, and the study is resumed.
"""

import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from made_up import build, write_study

from mllm_shapx.config.loading import LoadedConfig, load_config
from mllm_shapx.data.selection import select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.run import run_config
from mllm_shapx.execution.signals import StopRequest, stop_requests
from mllm_shapx.planning.sweep import expand, player_rule
from mllm_shapx.records.storage import join_uri
from mllm_shapx.reporting.progress import ProgressReporter
from mllm_shapx.reporting.standing import standing
from mllm_shapx.reporting.study_progress import StudyProgress

TENTH = 0.1
PLAYERS = (4, 11)
EXPERIMENTS: list[dict[str, Any]] = [
    {"explainer_type": "exact"},
    {"explainer_type": "limited_mc", "fractions": [0.2, 0.5]},
    {"explainer_type": "standard_cc", "linear": [2.0], "generation_override": {"max_new_tokens": 24}},
]
EVERY_S = 1.0
"""Seconds between two calls of `plan`."""


@dataclass(frozen=True)
class Said:
    """The estimates at one moment."""

    at: float
    share: float
    """Share of the expected coalitions done at that moment."""
    line: float | None
    """Seconds left in the progress line."""
    plan: float | None
    """Seconds left in `plan`; None without a call or an estimate."""


class Plan:
    """The time left of `mllm-shapx plan` for a config."""

    def __init__(self, loaded: LoadedConfig) -> None:
        settings = loaded.experiment_set
        self._runs = expand(settings, str(loaded.path)).runs
        self._selection = select_rows(
            open_table(settings.dataset, loaded.path),
            settings.dataset,
            settings.selection,
            settings.modality,
            player_rule(settings, loaded.path),
        )
        self._uri = join_uri(settings.output_root, settings.experiment_set_id)

    def seconds_left(self) -> float | None:
        """Read the current files of the study."""
        found = standing(self._uri, self._runs, self._selection.rows, self._selection.players)
        return None if found is None else found.seconds_left


class Listener(ProgressReporter):
    """Records the user's estimates, and may interrupt the study.

    Args:
        plan: Called every second.
        stop_at: Share of the coalitions at which to interrupt the study; None for never.
    """

    def __init__(self, plan: Plan, stop_at: float | None) -> None:
        self.said: list[Said] = []
        self.messages: list[str] = []
        self._plan = plan
        self._asked = 0.0
        self._stop_at = stop_at

    def update(self, progress: StudyProgress) -> None:
        """Record the time left; call `plan` when it is due."""
        now = time.monotonic()
        # A resumed study first computes runs from stored answers, and may have none.
        total = progress.coalitions_total
        share = progress.coalitions_done / total if total else 0.0
        said = None
        if now - self._asked > EVERY_S and share > TENTH / 2:
            said, self._asked = self._plan.seconds_left(), now
        self.said.append(Said(now, share, progress.eta_s, said))
        if self._stop_at is not None and share >= self._stop_at:
            self._stop_at = None
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text: str) -> None:
        """Keep a message."""
        self.messages.append(text)

    def close(self) -> None:
        """Keep everything."""


def write(folder: Path, model: Path, rows: int) -> Path:
    """Write rows and config of a study of several explainers with two generation settings."""
    rng = random.Random(rows)
    lengths = [rng.randint(*PLAYERS) for _ in range(rows)]
    return write_study(folder, model, lengths, EXPERIMENTS, new_tokens=8)


def run(loaded: LoadedConfig, workers: int, stop_at: float | None, *, resume: bool) -> tuple[Listener, float]:
    """Run a study; return its estimates and its end."""
    listener = Listener(Plan(loaded), stop_at)
    options = RunOptions(num_workers=workers or None, resume=resume)
    with stop_requests(StopRequest()) as request:
        outcome = run_config(loaded, options, listener, inline=workers == 0, request=request)
    ended = time.monotonic()
    if outcome.exit_code not in {0, 130}:
        raise click.ClickException("\n".join(listener.messages))
    return listener, ended


def over_truth(said: list[Said], ended: float, what: str) -> list[tuple[float, float]]:
    """Return (share done, estimated time left / true time left), from a tenth to nine tenths of the work."""
    found = []
    for each in said:
        value = getattr(each, what)
        if value is not None and TENTH <= each.share <= 1 - TENTH:
            found.append((each.share, value / (ended - each.at)))
    return found


def show(name: str, ratios: list[tuple[float, float]]) -> None:
    """Print the first estimate, the one at half of the work, and the worst."""
    if not ratios:
        click.echo(f"{name:32} nothing was said")
        return
    half = min(ratios, key=lambda each: abs(each[0] - 0.5))
    worst = max(ratios, key=lambda each: abs(each[1] - 1))
    cells = (f"{ratio:5.2f} at {share:4.0%}" for share, ratio in (ratios[0], half, worst))
    click.echo(f"{name:32} " + "   ".join(cells))


def measure(folder: Path, model: Path, rows: int, workers: int) -> None:
    """Run one study twice and print the accuracy of the estimates."""
    folder.mkdir()
    loaded = load_config(write(folder, model, rows))
    listener, ended = run(loaded, workers, None, resume=False)
    seconds = ended - next(each.at for each in listener.said if each.share > 0)
    where = "one process" if not workers else f"{workers} workers"
    click.echo(f"{rows} rows, {where}: {seconds:.0f} s from the first answer, load {os.getloadavg()[0]:.1f}")
    show("  progress line / truth", over_truth(listener.said, ended, "line"))
    show("  plan, under way / truth", over_truth(listener.said, ended, "plan"))
    (folder / "again").mkdir()
    again = load_config(write(folder / "again", model, rows))
    stopped = run(again, workers, TENTH, resume=False)[0].said[-1].share
    promised = Plan(again).seconds_left()
    began = time.monotonic()
    listener, ended = run(again, workers, None, resume=True)
    first = next(each.at for each in listener.said if each.share > listener.said[0].share)
    if promised is None:
        click.echo("  plan, after an interruption: nothing was said")
    else:
        click.echo(
            f"  plan, interrupted at {stopped:4.0%}: {promised:.1f} s; it took {ended - began:.1f} s, "
            f"{ended - first:.1f} s of it from the first answer: {promised / (ended - first):.2f}"
        )


@click.command()
@click.option("--parameters", type=click.Choice(["5m", "200m"]), default="5m")
@click.option("--rows", type=int, multiple=True, help="Rows of a study; default 8, 24 and 96.")
@click.option("--workers", type=int, default=0, help="Workers on Ray; 0 for one process without it.")
@click.option("--rounds", type=int, default=1, help="How often to measure.")
def main(parameters: str, rows: tuple[int, ...], workers: int, rounds: int) -> None:
    """Measure how true the time left is."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with tempfile.TemporaryDirectory(prefix="shapx-estimates-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        build(parameters, folder / "model")
        click.echo("columns: at the first moment after a tenth; at the half; furthest from the truth")
        for number in range(rounds):
            for count in rows or (8, 24, 96):
                measure(folder / f"{number}-{count}", folder / "model", count, workers)


if __name__ == "__main__":
    main()
