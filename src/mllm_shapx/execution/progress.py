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
        self._time_left = TimeLeft()

    def show(self, snapshot: Snapshot) -> None:
        """Show a snapshot and its notes."""
        elapsed = time.monotonic() - self._started
        if snapshot.workers:
            self._time_left.update(snapshot.coalitions_done, snapshot.coalitions_total)
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
                eta_s=self._time_left.seconds,
            )
        )
