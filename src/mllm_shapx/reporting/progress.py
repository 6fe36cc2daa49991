"""Progress while the work runs: a live display in a terminal, plain lines everywhere else."""

import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from mllm_shapx.plaintext import shown
from mllm_shapx.reporting.events import Events
from mllm_shapx.reporting.study_progress import RunProgress, StudyProgress, plain_line
from mllm_shapx.reporting.timing import Rate

__all__ = ["ProgressReporter", "RunProgress", "StudyProgress", "is_interactive"]

HEARTBEAT_S = 30.0
"""A plain line at least this often, so that a log shows that the job lives."""

_RATE_HALF_LIFE_S = 10.0


class ProgressReporter:
    """Shows progress on a stream. May be called from several threads; a stream that fails is left alone.

    Args:
        stream: Where to write, usually `sys.stderr`.
        interactive: True for the live display, False for plain lines (the config's
            `runtime.progress_bar: false`), None to look at the stream.
        every_s: Seconds between plain lines, or events.
        events: Where events are written instead, for programs; nothing is shown to people then.
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
        self.interactive = is_interactive(stream) if interactive is None else interactive
        if events is not None:
            self.interactive = False
        self._rate = Rate(_RATE_HALF_LIFE_S)
        self._notes: set[str] = set()
        self._lock = threading.RLock()
        self._view: _View
        if events is not None:
            self._view = _PacedView(
                events.progress, lambda text: events.write("message", text=text), every_s, clock
            )
        elif self.interactive:
            self._view = _live_view(stream)
        else:
            lines = _Lines(stream, now)
            self._view = _PacedView(lines.progress, lines.write, every_s, clock)

    def update(self, progress: StudyProgress) -> None:
        """Show `progress`. Call it every second or so, news or not; what is drawn is kept readable."""
        with self._lock:
            self._rate.observe(progress.elapsed_s, progress.coalitions_done)
            for note in progress.notes:
                if note not in self._notes:
                    self._notes.add(note)
                    self.message(note)
            self._guarded(lambda: self._view.show(progress, self._rate.per_second))

    def message(self, text: str) -> None:
        """Write a message above the display, or as a line of its own."""
        with self._lock:
            self._guarded(lambda: self._view.message(shown(text)))

    def close(self) -> None:
        """Show the last update and release the terminal. Calling it twice is harmless."""
        with self._lock:
            self._guarded(self._view.close)
            self._view = _NoView()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guarded(self, draw: Callable[[], None]) -> None:
        try:
            draw()
        except (OSError, ValueError):
            # A closed pipe or a terminal that went away: the work goes on without an audience.
            self._view = _NoView()


def is_interactive(stream: TextIO) -> bool:
    """Return whether a live display makes sense: a terminal that can move its cursor and draw a bar."""
    return is_capable(stream) and (getattr(stream, "encoding", None) or "").lower().startswith("utf")


def is_capable(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that takes control sequences."""
    is_dumb = os.environ.get("TERM", "").lower() in {"", "dumb", "unknown"}
    return not stream.closed and stream.isatty() and not is_dumb


class _View(Protocol):
    def show(self, progress: StudyProgress, rate: float | None) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def _live_view(stream: TextIO) -> _View:
    from mllm_shapx.reporting.live import LiveView

    return LiveView(stream)


class _NoView:
    """Shows nothing."""

    def show(self, progress: StudyProgress, rate: float | None) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _PacedView:
    """Writes progress every few seconds."""

    def __init__(
        self,
        write: Callable[[StudyProgress, float | None], None],
        message: Callable[[str], None],
        every_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._write = write
        self._message = message
        self._every_s = every_s
        self._clock = clock
        self._written_at: float | None = None
        self._written: StudyProgress | None = None
        self._latest: tuple[StudyProgress, float | None] | None = None

    def show(self, progress: StudyProgress, rate: float | None) -> None:
        self._latest = (progress, rate)
        if self._written_at is None:
            self._write_latest()
            return
        waited = self._clock() - self._written_at
        # What comes after the last sample may take a while.
        is_due = waited >= self._every_s or progress.is_finished
        if waited >= HEARTBEAT_S or (is_due and self._has_changed(progress)):
            self._write_latest()

    def message(self, text: str) -> None:
        self._message(text)

    def close(self) -> None:
        if self._latest is None or self._latest[0] == self._written:
            return
        # The end is written already, unless more than time and rates has changed since.
        if not self._latest[0].is_finished or self._has_changed(self._latest[0]):
            self._write_latest()

    def _has_changed(self, progress: StudyProgress) -> bool:
        return self._written is None or _substance(progress) != _substance(self._written)

    def _write_latest(self) -> None:
        if self._latest is None:
            return
        self._write(*self._latest)
        self._written, self._written_at = self._latest[0], self._clock()


class _Lines:
    """Plain lines, each written at once."""

    def __init__(self, stream: TextIO, now: Callable[[], datetime]) -> None:
        self._stream = stream
        self._now = now

    def progress(self, progress: StudyProgress, rate: float | None) -> None:
        """Write how far the study is."""
        self.write(plain_line(progress, rate))

    def write(self, text: str) -> None:
        """Write one line."""
        line = f"[{self._now():%H:%M:%S}] {text}\n"
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(_encodable(line, encoding))
        self._stream.flush()


def _substance(progress: StudyProgress) -> tuple[Any, ...]:
    """Return what counts as a change: not the time alone."""
    return (progress.runs, progress.coalitions_done, progress.model_calls, progress.workers)


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace("·", "|").replace("…", "...")
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text
