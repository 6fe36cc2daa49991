"""How much of a plan is done already, from the files, and how long the rest will take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.pace import Pace, read_pace
from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.timing import format_duration


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a plan is."""

    samples_done: int
    samples_failed: int
    """Given up; they are no part of the time left."""
    samples: int
    seconds_left: float | None
    """What the rest takes with as many workers as before; None where too little was measured."""
    workers: int | None
    """Workers that the time left counts on."""

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
        workers = "one worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{text}; the rest takes about {format_duration(self.seconds_left)} on {workers}, as before."


def standing(
    uri: str,
    runs: Sequence[RunSpec],
    rows: Sequence[int],
    players: Mapping[int, int] | None,
) -> Standing | None:
    """Return how far the plan is in the experiment set's directory `uri`; None when nothing of it is there.

    The time left is computed from what answers cost when the study last ran (`pace.json`), for the rows and
    runs that the plan has now. Answers stored for rows that are not done make it less.

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
    """Return the time that units take with as many workers as before; None when some cost is not known."""
    if any(unit.cost_key not in pace.seconds for unit in units):
        return None
    return sum(unit.cost * pace.seconds[unit.cost_key] for unit in units) / pace.workers
