"""The live display of a terminal: a bar, a short line per run and the workers, redrawn in place by rich."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from mllm_shapx.reporting.study_progress import (
    RunProgress,
    StudyProgress,
    WorkerProgress,
    choose_runs,
    pace,
    percent,
    summarize_rest,
    workers_in_words,
)
from mllm_shapx.reporting.timing import format_duration, format_rate

REDRAWS_PER_SECOND = 4
_MOST_RUNS = 8
_LEAST_RUNS = 2
_MOST_WORKERS = 8
_MOST_ROWS = 4
_GIB = 1 << 30
_FRAME_LINES = 6
"""Other lines than those of runs: bar, counts, rest, workers, and the line of the shell."""


class LiveView:
    """Draws on a terminal. What others write to the standard streams meanwhile appears above it."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._live = Live(
            console=self._console,
            refresh_per_second=REDRAWS_PER_SECOND,
            # Only output to the terminal is redirected, not output to a pipe.
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        self._open = contextlib.ExitStack()
        self._standard = (sys.stdout, sys.stderr)

    def show(self, progress: StudyProgress, rate: float | None) -> None:
        """Replace the picture. It is drawn at the next regular redraw."""
        self._live.update(render(progress, rate, self._console.height))
        if not self._live.is_started:
            before = (sys.stdout, sys.stderr)
            self._open.callback(self._live.stop)
            self._live.start(refresh=True)
            self._standard = (sys.stdout, sys.stderr)
            self._open.enter_context(_handlers_moved(before))

    def message(self, text: str) -> None:
        """Write above the picture."""
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Draw a last time and leave the picture on the terminal."""
        out, err = sys.stdout, sys.stderr
        self._open.close()
        # rich restores the streams of its start. A later change by others is kept.
        if out is not self._standard[0]:
            sys.stdout = out
        if err is not self._standard[1]:
            sys.stderr = err


def render(progress: StudyProgress, rate: float | None, height: int) -> RenderableType:
    """Return the picture, with as many runs and workers as a terminal of `height` lines has room for."""
    lines: list[RenderableType] = [_bar(progress), _counts(progress, rate)]
    if len(progress.runs) > 1:
        taken = _FRAME_LINES + min(len(progress.worker_list), _MOST_WORKERS)
        shown, rest = choose_runs(progress.runs, max(_LEAST_RUNS, min(_MOST_RUNS, height - taken)))
        lines.append(_run_lines(shown))
        if rest:
            lines.append(_line(f"  … {summarize_rest(rest)}", "dim"))
    lines.append(_workers(progress))
    most = max(0, min(_MOST_WORKERS, height - _FRAME_LINES - _LEAST_RUNS))
    if progress.worker_list and most:
        lines.append(_worker_lines(progress.worker_list[:most]))
        if (hidden := len(progress.worker_list) - most) > 0:
            lines.append(_line(f"  … and {hidden} more workers", "dim"))
    return Group(*lines)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _bar(progress: StudyProgress) -> RenderableType:
    done, total = progress.coalitions_done, progress.coalitions_total
    if not total:
        done, total = progress.samples_done + progress.samples_failed, progress.samples_total
    grid = Table.grid(Column(ratio=1), Column(justify="right", no_wrap=True), padding=(0, 1), expand=True)
    bar = ProgressBar(total=max(1, total), completed=done if total else 1)
    grid.add_row(bar, Text(percent(done, total), style="bold"))
    return grid


def _counts(progress: StudyProgress, rate: float | None) -> Text:
    parts = [
        f"{progress.samples_done:,}/{progress.samples_total:,} samples",
        *pace(progress, rate)[::-1],
        f"{progress.coalitions_done:,}/{progress.coalitions_total:,} coalitions",
    ]
    text = _line(" · ".join(parts))
    if progress.samples_failed:
        text.append(f" · {progress.samples_failed:,} failed", style="red")
    return text


def _run_lines(runs: Sequence[RunProgress]) -> RenderableType:
    counts = Column(justify="right", no_wrap=True)
    grid = Table.grid(Column(no_wrap=True, overflow="ellipsis"), counts, Column(no_wrap=True), padding=(0, 1))
    for run in runs:
        note = Text(f"{run.failed} failed" if run.failed else "", style="red")
        style = "green" if run.is_finished else "" if run.done + run.failed else "dim"
        grid.add_row(Text(f"  {run.name}", style=style), Text(f"{run.done}/{run.total}", style=style), note)
    return grid


def _workers(progress: StudyProgress) -> Text:
    parts = [workers_in_words(progress), f"{progress.model_calls:,} model calls"]
    if progress.store_hits:
        parts.append(f"{progress.store_hits:,} from the store")
    parts.append(f"{format_duration(progress.elapsed_s)} so far")
    return _line(" · ".join(parts), "dim")


def _worker_lines(workers: Sequence[WorkerProgress]) -> RenderableType:
    grid = Table.grid(
        Column(no_wrap=True),
        Column(justify="right", no_wrap=True),
        Column(no_wrap=True),
        Column(no_wrap=True, overflow="ellipsis"),
        padding=(0, 1),
    )
    for worker in workers:
        rate = format_rate(worker.per_second) if worker.per_second else ""
        about = (f"  {worker.name} {worker.device}", rate, _memory(worker))
        work = Text(worker.waiting_for or _rows(worker), style="yellow" if worker.waiting_for else "dim")
        grid.add_row(*(Text(cell, style="dim") for cell in about), work)
    return grid


def _memory(worker: WorkerProgress) -> str:
    if worker.gpu_memory is None:
        return ""
    used, total = (number / _GIB for number in worker.gpu_memory)
    return f"{used:.1f}/{total:.0f} GiB"


def _rows(worker: WorkerProgress) -> str:
    if not worker.rows:
        return "no row of its own"
    shown = ", ".join(map(str, worker.rows[:_MOST_ROWS]))
    more = f" and {len(worker.rows) - _MOST_ROWS} more" if len(worker.rows) > _MOST_ROWS else ""
    return f"{'row' if len(worker.rows) == 1 else 'rows'} {shown}{more}"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


@contextlib.contextmanager
def _handlers_moved(before: tuple[TextIO, TextIO]) -> Iterator[None]:
    """Let log handlers of the streams `before` write to today's standard streams, which know the display."""
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {item for log in loggers if isinstance(log, logging.Logger) for item in log.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            after = sys.stdout if handler.stream is before[0] else sys.stderr
            if after is not handler.stream:
                moved.append((handler, handler.setStream(after)))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
