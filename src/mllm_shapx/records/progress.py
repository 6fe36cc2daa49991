"""`progress.json` of an experiment set: how fast the work goes, left behind for `status`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mllm_shapx.records.layout import PROGRESS
from mllm_shapx.records.storage import Storage, read_json, write_json


@dataclass(frozen=True, slots=True)
class RunPace:
    """What the samples of one run took, and how fast they come."""

    samples: int
    """Samples that are counted here."""
    coalitions: int
    answers: int
    """Answers that were generated for this run."""
    samples_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class ProgressNote:
    """How far a driver was when it last wrote."""

    at: float
    """Seconds since 1970."""
    elapsed_s: float
    """Seconds since the driver began."""
    workers: int
    store_hits: int
    """Answers that this driver took from the store."""
    coalitions_per_second: float | None = None
    seconds_left: float | None = None
    """None while too little was measured."""
    runs: Mapping[str, RunPace] = field(default_factory=dict)


_NOTE = TypeAdapter(ProgressNote)


def write_progress(storage: Storage, note: ProgressNote) -> None:
    """Write the file, whole."""
    write_json(storage, PROGRESS, asdict(note))


def read_progress(storage: Storage) -> ProgressNote | None:
    """Return what a driver left behind; None where there is nothing, or nothing that can be read."""
    try:
        data: Any = read_json(storage, PROGRESS)
        return _NOTE.validate_python(data)
    except (OSError, ValueError, ValidationError):
        return None
