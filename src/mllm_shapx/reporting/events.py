"""Events of a running command for programs: one JSON object a line (docs/running.md, Events)."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, TextIO

from mllm_shapx.plaintext import printable_json, redacted
from mllm_shapx.reporting.study_progress import StudyProgress, WorkerProgress

Kind = Literal["started", "progress", "message", "outcome", "error"]


class Events:
    """Writes events to a stream. May be called from several threads.

    Args:
        stream: Where to write, usually `sys.stdout`.
        now: Gives seconds since 1970.
    """

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.time) -> None:
        self._stream = stream
        self._now = now
        self._lock = threading.Lock()

    def write(self, kind: Kind, **content: Any) -> None:
        """Write one event, whole and at once.

        Raises:
            OSError: When the stream is closed at its other end.
        """
        data = {"event": kind, "at": round(self._now(), 3), **content}
        text = printable_json(redacted(json.dumps(data, ensure_ascii=False, allow_nan=False)))
        with self._lock:
            self._stream.write(text + "\n")
            self._stream.flush()

    def message(self, text: str) -> None:
        """Write a message."""
        self.write("message", text=text)

    def progress(self, progress: StudyProgress, rate: float | None) -> None:
        """Write the progress of the study."""
        self.write(
            "progress",
            samples_done=progress.samples_done,
            samples_failed=progress.samples_failed,
            samples_total=progress.samples_total,
            coalitions_done=progress.coalitions_done,
            coalitions_total=progress.coalitions_total,
            coalitions_per_second=rate,
            model_calls=progress.model_calls,
            store_hits=progress.store_hits,
            elapsed_s=progress.elapsed_s,
            seconds_left=progress.eta_s,
            workers_busy=progress.busy_workers,
            workers=[_worker(worker) for worker in progress.worker_list],
            runs=[asdict(run) for run in progress.runs],
        )


def _worker(worker: WorkerProgress) -> dict[str, Any]:
    data = asdict(worker)
    data["coalitions_per_second"] = data.pop("per_second")
    data["gpu_memory_used"], data["gpu_memory_total"] = data.pop("gpu_memory") or (None, None)
    return data
