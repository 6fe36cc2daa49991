"""Passes the states of a study to the reporter and to `status`."""

import contextlib
import time
from collections import defaultdict
from dataclasses import replace

from mllm_shapx.errors import StorageError
from mllm_shapx.execution.messages import StudyState
from mllm_shapx.records.progress import ProgressNote, RunPace, write_progress
from mllm_shapx.records.storage import Storage
from mllm_shapx.reporting.progress import ProgressReporter
from mllm_shapx.reporting.study_progress import RunProgress, StudyProgress
from mllm_shapx.reporting.timing import Rate, TimeLeft, lasting_rate

NOTE_S = 5.0
"""Seconds between two writes of `progress.json`."""
_WORKER_HALF_LIFE_S = 15.0


class ProgressFeed:
    """Shows the states of a study, and writes `progress.json` into its directory."""

    def __init__(self, reporter: ProgressReporter, storage: Storage) -> None:
        self._reporter = reporter
        self._storage = storage
        self._started = time.monotonic()
        self._by_answers = TimeLeft()
        self._by_device_seconds = TimeLeft()
        self._rate = lasting_rate()
        self._runs: defaultdict[str, Rate] = defaultdict(lasting_rate)
        self._workers: defaultdict[str, Rate] = defaultdict(lambda: Rate(_WORKER_HALF_LIFE_S))
        self._noted: float | None = None
        self._latest: StudyState | None = None
        self._has_work = False

    def show(self, state: StudyState) -> None:
        """Show a state and its notes."""
        self._measure(state)
        self._has_work = self._has_work or not state.finished
        for note in state.notes:
            self._reporter.message(note)
        runs = (
            RunProgress(name, total, state.done[name], state.failed[name])
            for name, total in state.total.items()
        )
        workers = (
            replace(worker, per_second=self._workers[worker.name].per_second) for worker in state.worker_list
        )
        self._reporter.update(
            StudyProgress(
                runs=tuple(runs),
                coalitions_done=round(state.coalitions_done),
                coalitions_total=round(state.coalitions_total),
                model_calls=state.model_calls,
                workers=len(state.workers),
                busy_workers=state.busy_workers,
                elapsed_s=self._elapsed_s,
                eta_s=self._seconds_left,
                store_hits=state.store_hits,
                worker_list=tuple(workers),
            )
        )
        self._latest = state
        now = time.monotonic()
        if self._noted is None or now - self._noted >= NOTE_S:
            self._noted = now
            self.close()

    def close(self) -> None:
        """Write the last progress; leave a directory without open work unchanged."""
        state = self._latest
        if state is None or not self._has_work:
            return
        note = ProgressNote(
            at=time.time(),
            elapsed_s=self._elapsed_s,
            workers=len(state.workers),
            store_hits=state.store_hits,
            coalitions_per_second=self._rate.per_second,
            seconds_left=self._seconds_left,
            runs={
                name: RunPace(state.done[name], coalitions, answers, self._runs[name].per_second)
                for name, (coalitions, answers) in state.calls.items()
            },
        )
        # On a full disk the coordinator stops the study.
        with contextlib.suppress(StorageError, OSError):
            write_progress(self._storage, note)

    def _measure(self, state: StudyState) -> None:
        elapsed = self._elapsed_s
        if state.workers:
            self._by_answers.update(state.coalitions_done, state.coalitions_total)
            if state.device_seconds_left is not None:
                total = state.device_seconds + state.device_seconds_left
                self._by_device_seconds.update(state.device_seconds, total)
        self._rate.observe(elapsed, state.coalitions_done)
        for name, done in state.done.items():
            self._runs[name].observe(elapsed, done)
        for name, answers in state.worker_answers.items():
            self._workers[name].observe(elapsed, answers)

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def _seconds_left(self) -> float | None:
        """Return the seconds left by the measured cost of answers, or by their number if unmeasured."""
        measured = self._by_device_seconds.seconds
        return self._by_answers.seconds if measured is None else measured
