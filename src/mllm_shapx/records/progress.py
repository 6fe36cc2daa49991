"""`progress.json` of an experiment set: the current speed, for `status`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

from mllm_shapx.records.layout import PROGRESS
from mllm_shapx.records.storage import Storage, read_json, write_json


@dataclass(frozen=True, slots=True)
class RunPace:
    """Counts and speed of one run's samples."""

    samples: int
    """Number of counted samples."""
    coalitions: int
    answers: int
    """Answers generated for this run."""
    samples_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class ProgressNote:
    """A driver's progress at its last write."""

    at: float
    """Seconds since 1970."""
    elapsed_s: float
    """Seconds since the driver's start."""
    workers: int
    store_hits: int
    """Answers that this driver reused from the store."""
    coalitions_per_second: float | None = None
    seconds_left: float | None = None
    """None before enough measurements."""
    runs: Mapping[str, RunPace] = field(default_factory=dict)


_NOTE = TypeAdapter(ProgressNote)


def write_progress(storage: Storage, note: ProgressNote) -> None:
    """Write the file, whole."""
    write_json(storage, PROGRESS, asdict(note))


def read_progress(storage: Storage) -> ProgressNote | None:
    """Return a driver's last note; None if the file is missing or unreadable."""
    try:
        return _NOTE.validate_python(read_json(storage, PROGRESS))
    except (OSError, ValueError):
        return None
