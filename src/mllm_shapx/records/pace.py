"""`pace.json` of an experiment set: the measured cost of answers, for `plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_shapx.records.layout import PACE
from mllm_shapx.records.storage import Storage, read_json, write_json


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a study ran the last time."""

    workers: int
    """Most workers that ran at the same time."""
    seconds: Mapping[str, Mapping[int, float]]
    """`RunSpec.cost_key` -> players of a row -> seconds of a worker's device per expected answer."""

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        keys = {
            key: {str(players): each for players, each in sorted(of_key.items())}
            for key, of_key in self.seconds.items()
        }
        return {"workers": self.workers, "seconds_per_answer": keys}


def write_pace(storage: Storage, pace: Pace) -> None:
    """Write the file, whole."""
    write_json(storage, PACE, pace.to_json())


def read_pace(storage: Storage) -> Pace | None:
    """Return the measured pace; None when the file is missing or damaged."""
    try:
        data = read_json(storage, PACE)
        seconds = {
            str(key): {int(players): float(each) for players, each in of_key.items()}
            for key, of_key in data["seconds_per_answer"].items()
        }
        return Pace(max(1, int(data["workers"])), seconds)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
