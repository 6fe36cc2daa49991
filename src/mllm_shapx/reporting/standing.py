"""How much of a plan is done, from the files, and how long the rest takes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.pace import Pace, read_pace
from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.timing import count_workers, format_duration


@dataclass(frozen=True, slots=True)
class Standing:
    """How much of a plan is done."""

    samples_done: int
    samples_failed: int
    """Given up; the time left does not count them."""
    samples: int
    seconds_left: float | None
    """Time for the rest with as many workers as before; None without measurements of all its costs."""
    workers: int | None
    """Workers for which the time left is computed."""

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON data."""
        return asdict(self)

    def to_text(self) -> str:
        """Return it in a sentence."""
        text = f"{self.samples_done:,} of {self.samples:,} samples are done"
        if self.samples_failed:
            text += f", {self.samples_failed:,} failed"
        if self.samples_done + self.samples_failed == self.samples:
            return f"{text}: nothing is left."
        if self.seconds_left is None:
            return f"{text}."
        left = f"{format_duration(self.seconds_left)} on {count_workers(self.workers)}"
        return f"{text}; the rest takes about {left}, as before."


def standing(
    uri: str,
    runs: Sequence[RunSpec],
    rows: Sequence[int],
    players: Mapping[int, int] | None,
) -> Standing | None:
    """Return how much of a plan is done in the experiment set's directory `uri`; None without any sample.

    The time left is that of the open rows and runs of this plan, at the cost of an answer in the study's last
    run (`pace.json`). It does not know of stored answers for open rows, which need no time.

    Raises:
        StorageError: When the directory cannot be read.
    """
    storage = open_storage(uri)
    planned = frozenset(rows)
    records = {run.name: RunReader(storage, run.name) for run in runs}
    done = {name: planned.intersection(of_run.sample_rows()) for name, of_run in records.items()}
    failed = {name: planned & of_run.quarantined_rows() - done[name] for name, of_run in records.items()}
    if not any(done.values()):
        return None
    pace = read_pace(storage)
    left = plan_units(runs, rows, players, {name: done[name] | failed[name] for name in done})
    return Standing(
        samples_done=sum(map(len, done.values())),
        samples_failed=sum(map(len, failed.values())),
        samples=len(planned) * len(runs),
        seconds_left=None if pace is None else _seconds(left, pace),
        workers=None if pace is None else pace.workers,
    )


def _seconds(units: Sequence[WorkUnit], pace: Pace) -> float | None:
    if any(unit.cost_key not in pace.seconds for unit in units):
        return None
    return sum(unit.cost * pace.seconds[unit.cost_key] for unit in units) / pace.workers
