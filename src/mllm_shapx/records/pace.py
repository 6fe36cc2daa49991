"""`pace.json` of an experiment set: the measured cost of answers, for `plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_shapx.records.layout import PACE
from mllm_shapx.records.storage import Storage, read_json, write_json


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed of a study's last run."""

    workers: int
    """Largest number of concurrent workers."""
    seconds: Mapping[str, float]
    """`RunSpec.cost_key` -> seconds of a worker's device per expected answer."""

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        return {"workers": self.workers, "seconds_per_answer": dict(self.seconds)}


def write_pace(storage: Storage, pace: Pace) -> None:
    """Write the file, whole."""
    write_json(storage, PACE, pace.to_json())


def read_pace(storage: Storage) -> Pace | None:
    """Return the measured pace; None if the file is missing or damaged."""
    try:
        data = read_json(storage, PACE)
        seconds = {str(key): float(each) for key, each in data["seconds_per_answer"].items()}
        return Pace(max(1, int(data["workers"])), seconds)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
