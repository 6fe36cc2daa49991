"""A tracker that calls its library from a thread of its own: no sample waits for it."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mllm_shapx.plaintext import redacted
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.content import run_id, sample_metrics, without_secrets
from mllm_shapx.tracking.history import COUNTER
from mllm_shapx.tracking.tracker import Backend, RunStart, TrackedRun

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Seconds that a sample may wait for others that are sent together with it."""

_MAX_WAITING = 100_000
"""Most waiting calls before a tracker is switched off: one that hangs must not fill the memory."""

_CLOSE_S_PER_RUN = 10.0


class BackgroundTracker:
    """Sends what happens to a backend. No method waits for a server or raises because of it, except `close`.

    The first error becomes a warning. Every sample on disk is logged once, whatever was killed before: at the
    start and at the end of a run, samples that its history lacks are read from their files. A row that was
    explained again with other values is logged again.

    Args:
        backend: The tracker's library.
        experiment_set_id: Part of every run's id.
        warn: Takes the one warning. It is called from another thread.
        close_timeout_s: Seconds that `close` waits for what is still to be sent, and ten more per open run.
    """

    def __init__(
        self,
        backend: Backend,
        experiment_set_id: str,
        *,
        warn: Callable[[str], None] = logger.warning,
        close_timeout_s: float = 60.0,
    ) -> None:
        self._set_id = experiment_set_id
        self._session = _Session(backend, warn)
        self._close_timeout_s = close_timeout_s
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._ending = False

    def start(self, run_name: str, spec: Mapping[str, Any], *, records: RunRecords, salt: str = "") -> None:
        """Open one run with `spec` as its config; secrets in it are left out.

        Args:
            run_name: The run's name in the sweep and in the tracker.
            spec: JSON data, such as the content of `spec.json`.
            records: The run's files. Samples that the history lacks are read from them.
            salt: Part of the id. Give what a fresh start changes and a resumed one keeps, such as the
                checkpoint's `created_at`, so that a run that is done again does not append to the old one.
        """
        run = RunStart(run_name, run_id(self._set_id, run_name, salt), without_secrets(spec), records)
        self._submit(lambda: self._session.start(run))

    def log_sample(self, result: SampleResult) -> None:
        """Log one sample of a started run."""
        metrics = sample_metrics(result)
        self._submit(lambda: self._session.log(result.run_name, metrics))

    def finish(self, run_name: str, summary: Mapping[str, Any]) -> None:
        """Close one run with its summary and its files; an unknown run is ignored.

        Args:
            run_name: A started run.
            summary: JSON data, such as the content of `aggregate_metrics.json`.
        """
        content = dict(summary)
        self._submit(lambda: self._session.finish(run_name, content))

    def begin_close(self) -> None:
        """Let the thread end once it has sent what is left, without waiting for it."""
        if self._thread is not None and not self._ending:
            self._put(self._session.stop)
            self._put(None)
        self._ending = True

    def close(self) -> None:
        """Send what is left for a limited time, mark unfinished runs as failed, and stop.

        Calling it twice is harmless.
        """
        self.begin_close()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        patience_s = self._close_timeout_s + _CLOSE_S_PER_RUN * self._session.open_runs
        thread.join(patience_s)
        if thread.is_alive():
            after = self._session.backend.after_timeout
            self._session.warn_once(f"it was still sending after {patience_s:g} s; {after}")

    def _submit(self, call: Callable[[], None]) -> None:
        if self._ending or self._session.is_off:
            return
        if self._thread is None:
            name = f"{self._session.backend.extra}-tracker"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
        self._put(call)

    def _put(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._session.switch_off(f"{_MAX_WAITING} calls are waiting for it")

    def _work(self) -> None:
        flushed = time.monotonic()
        while True:
            try:
                call = self._calls.get(timeout=FLUSH_S)
            except queue.Empty:
                self._session.flush()
                continue
            if call is None:
                return
            call()
            if time.monotonic() - flushed > FLUSH_S:
                self._session.flush()
                flushed = time.monotonic()


@dataclass
class _OpenRun:
    run: TrackedRun
    records: RunRecords
    is_behind: bool = False
    """Whether a sample could not be sent: the rest is logged at the end of the run."""


class _Session:
    """Calls the backend, from the tracker's thread."""

    def __init__(self, backend: Backend, warn: Callable[[str], None]) -> None:
        self.backend = backend
        self.is_off = False
        """Whether it takes no further calls."""
        self._takes_runs = True
        self._warn = warn
        self._runs: dict[str, _OpenRun] = {}
        self._warned = False
        self._warn_lock = threading.Lock()

    @property
    def open_runs(self) -> int:
        """Return how many runs are open."""
        return len(self._runs)

    def start(self, run: RunStart) -> None:
        if not self._takes_runs or run.name in self._runs:
            return
        try:
            self._runs[run.name] = _OpenRun(self.backend.open(run), run.records)
        except Exception as error:  # noqa: BLE001 -- an error of the library is a warning and costs no sample
            # No further runs are opened: after one that took its whole timeout, thirty more would too.
            self._takes_runs = False
            self.is_off = not self._runs
            extra = self.backend.extra
            fix = f"{error}; install the extra `{extra}` or set {extra}.enabled to false"
            self.warn_once(fix if isinstance(error, ImportError) else _describe(error))
        else:
            self._catch_up(run.name)

    def log(self, run_name: str, metrics: dict[str, float | str]) -> None:
        opened = self._runs.get(run_name)
        if opened is None or opened.is_behind:
            return
        history = opened.run.history
        if history.holds(metrics):
            return
        line = {COUNTER: history.counter + 1, **metrics}
        history.add(line)
        self._attempt(run_name, lambda: opened.run.log(line))

    def flush(self) -> None:
        """Send the samples that wait."""
        for run_name, opened in list(self._runs.items()):
            if not opened.is_behind:
                self._attempt(run_name, opened.run.flush)

    def finish(self, run_name: str, summary: dict[str, Any]) -> None:
        opened = self._runs.get(run_name)
        if opened is None:
            return
        if opened.is_behind:
            with self._warning(f"run {run_name} may lack samples"):
                opened.run.reload()
                opened.is_behind = False
        if opened.is_behind:
            self._end(run_name, failed=True)
            return
        self._catch_up(run_name)
        if run_name in self._runs:
            self._attempt(run_name, opened.run.flush)
        if run_name in self._runs:
            with self._warning(f"run {run_name} lacks its summary or some files"):
                opened.run.finish(summary)
            self._end(run_name, failed=opened.is_behind)

    def stop(self) -> None:
        """Close what `finish` was not called for, and let the backend write everything."""
        self.flush()
        for run_name in list(self._runs):
            self._end(run_name, failed=True)
        with self._warning("it did not end properly"):
            self.backend.close()

    def switch_off(self, reason: str) -> None:
        """Take no further calls."""
        self.is_off = True
        self.warn_once(reason)

    def warn_once(self, reason: str) -> None:
        with self._warn_lock:
            if self._warned:
                logger.debug("%s: %s", self.backend.name, reason)
                return
            self._warned = True
        self._warn(f"{self.backend.name}: {redacted(reason)}. The results on disk are not affected")

    @contextlib.contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        """Turn an error into a warning; `what` is its effect."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- as above
            self.warn_once(f"{what}: {_describe(error)}")

    def _catch_up(self, run_name: str) -> None:
        """Log the samples on disk that the history lacks."""
        opened = self._runs[run_name]
        with self._warning(f"run {run_name} may lack samples"):
            rows = opened.run.history.rows
            for row in [row for row in opened.records.sample_rows() if row not in rows]:
                self.log(run_name, sample_metrics(opened.records.read_sample(row)))

    def _attempt(self, run_name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 -- as above
            opened = self._runs[run_name]
            if opened.run.recovers:
                opened.is_behind = True
                self.warn_once(f"run {run_name} gets the rest of its samples at its end: {_describe(error)}")
            else:
                del self._runs[run_name]
                self.warn_once(f"run {run_name} is no longer tracked: {_describe(error)}")

    def _end(self, run_name: str, *, failed: bool) -> None:
        opened = self._runs.pop(run_name, None)
        if opened is None:
            return
        with self._warning(f"run {run_name} may be incomplete"):
            try:
                opened.run.close(failed=failed)
            except TimeoutError as error:
                # The server is gone: waiting as long for every other run would hold up the end of the job.
                self._runs.clear()
                self.switch_off(f"run {run_name} could not be sent: {error}; {self.backend.after_timeout}")


def _describe(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(" .") if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
