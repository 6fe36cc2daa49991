"""From the coordinator's snapshots to what the reporter shows."""

import time

from mllm_shapx.execution.messages import Snapshot
from mllm_shapx.reporting.progress import ProgressReporter
from mllm_shapx.reporting.study_progress import RunProgress, StudyProgress
from mllm_shapx.reporting.timing import TimeLeft


class ProgressFeed:
    """Keeps a reporter up to date."""

    def __init__(self, reporter: ProgressReporter) -> None:
        self._reporter = reporter
        self._started = time.monotonic()
        self._by_answers = TimeLeft()
        self._by_device_seconds = TimeLeft()

    def show(self, snapshot: Snapshot) -> None:
        """Show a snapshot and its notes."""
        elapsed = time.monotonic() - self._started
        if snapshot.workers:
            self._by_answers.update(snapshot.coalitions_done, snapshot.coalitions_total)
            if snapshot.device_seconds_left is not None:
                total = snapshot.device_seconds + snapshot.device_seconds_left
                self._by_device_seconds.update(snapshot.device_seconds, total)
        for note in snapshot.notes:
            self._reporter.message(note)
        self._reporter.update(
            StudyProgress(
                runs=tuple(
                    RunProgress(name, total, snapshot.done[name], snapshot.failed[name])
                    for name, total in snapshot.total.items()
                ),
                coalitions_done=round(snapshot.coalitions_done),
                coalitions_total=round(snapshot.coalitions_total),
                model_calls=snapshot.model_calls,
                workers=len(snapshot.workers),
                busy_workers=snapshot.busy_workers,
                elapsed_s=elapsed,
                eta_s=self._seconds_left,
            )
        )

    @property
    def _seconds_left(self) -> float | None:
        """Return the time left by what answers were measured to cost, else as if all cost the same."""
        measured = self._by_device_seconds.seconds
        return self._by_answers.seconds if measured is None else measured
