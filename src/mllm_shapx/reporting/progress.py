"""Progress while the work runs: a live display in a terminal, plain lines or events everywhere else."""

import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self, TextIO

from mllm_shapx.plaintext import shown
from mllm_shapx.reporting.events import Events
from mllm_shapx.reporting.study_progress import StudyProgress, plain_line
from mllm_shapx.reporting.timing import Rate

_HEARTBEAT_S = 30.0
"""Longest time between two plain lines: a log shows that the job is running."""
_RATE_HALF_LIFE_S = 10.0


class ProgressReporter:
    """Shows progress on a stream. May be called from several threads; a stream that fails is not used again.

    Args:
        stream: Where to write, usually `sys.stderr`.
        interactive: True for the live display, False for plain lines (the config's
            `runtime.progress_bar: false`), None to decide by the stream.
        every_s: Seconds between plain lines, or events.
        events: Where events for programs are written; the stream is not used then.
        clock: Seconds that only grow.
        now: The time that plain lines begin with.
    """

    def __init__(
        self,
        stream: TextIO,
        interactive: bool | None = None,
        every_s: float = 5.0,
        *,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._rate = Rate(_RATE_HALF_LIFE_S)
        self._lock = threading.RLock()
        self._view: _View | None
        if events is not None:
            self._view = _PacedView(events, every_s, clock)
        elif is_interactive(stream) if interactive is None else interactive:
            from mllm_shapx.reporting.live import LiveView

            self._view = LiveView(stream)
        else:
            self._view = _PacedView(_Lines(stream, now), every_s, clock)

    def update(self, progress: StudyProgress) -> None:
        """Show `progress`. Call it every second or so; the display decides how often it changes."""
        with self._lock:
            self._rate.observe(progress.elapsed_s, progress.coalitions_done)
            self._draw(lambda view: view.show(progress, self._rate.per_second))

    def message(self, text: str) -> None:
        """Write a message above the display, or as a line of its own."""
        self._draw(lambda view: view.message(shown(text)))

    def close(self) -> None:
        """Show the last update and release the terminal. Calling it twice is harmless."""
        with self._lock:
            self._draw(lambda view: view.close())
            self._view = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self, draw: "Callable[[_View], None]") -> None:
        with self._lock:
            try:
                if self._view is not None:
                    draw(self._view)
            except (OSError, ValueError):
                self._view = None  # a closed pipe, or a terminal that went away


def is_interactive(stream: TextIO) -> bool:
    """Return whether a live display makes sense: a terminal that can move its cursor and draw a bar."""
    return is_capable(stream) and (getattr(stream, "encoding", None) or "").lower().startswith("utf")


def is_capable(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that takes control sequences."""
    is_dumb = os.environ.get("TERM", "").lower() in {"", "dumb", "unknown"}
    return not stream.closed and stream.isatty() and not is_dumb


class _Writer(Protocol):
    """Writes lines for people (`_Lines`) or for programs (`Events`)."""

    def progress(self, progress: StudyProgress, rate: float | None) -> None: ...

    def message(self, text: str) -> None: ...


class _View(Protocol):
    def show(self, progress: StudyProgress, rate: float | None) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class _PacedView:
    """Writes progress every few seconds."""

    def __init__(self, writer: _Writer, every_s: float, clock: Callable[[], float]) -> None:
        self.message = writer.message
        self._writer = writer
        self._every_s = every_s
        self._clock = clock
        self._written_at = 0.0
        self._written: StudyProgress | None = None
        self._latest: tuple[StudyProgress, float | None] | None = None

    def show(self, progress: StudyProgress, rate: float | None) -> None:
        self._latest = (progress, rate)
        waited = self._clock() - self._written_at
        # The end is shown at once: the work after the last sample may take some time.
        is_due = waited >= self._every_s or progress.is_finished
        if self._written is None or waited >= _HEARTBEAT_S or (is_due and self._is_news(progress)):
            self._write(progress, rate)

    def close(self) -> None:
        if self._latest is None or self._latest[0] == self._written:
            return
        # The line of the end is not written again for new times and rates alone.
        if not self._latest[0].is_finished or self._is_news(self._latest[0]):
            self._write(*self._latest)

    def _is_news(self, progress: StudyProgress) -> bool:
        """Return whether more than time and rates has changed since the last line."""
        before = self._written
        return before is None or any(
            getattr(progress, name) != getattr(before, name)
            for name in ("runs", "coalitions_done", "model_calls", "workers")
        )

    def _write(self, progress: StudyProgress, rate: float | None) -> None:
        self._writer.progress(progress, rate)
        self._written, self._written_at = progress, self._clock()


class _Lines:
    """Plain lines, each written at once."""

    def __init__(self, stream: TextIO, now: Callable[[], datetime]) -> None:
        self._stream = stream
        self._now = now

    def progress(self, progress: StudyProgress, rate: float | None) -> None:
        """Write one line on the study."""
        self.message(plain_line(progress, rate))

    def message(self, text: str) -> None:
        """Write one line."""
        line = f"[{self._now():%H:%M:%S}] {text}\n"
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            line.encode(encoding)
        except UnicodeEncodeError:
            line = line.replace("·", "|").replace("…", "...")
            line = line.encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(line)
        self._stream.flush()
