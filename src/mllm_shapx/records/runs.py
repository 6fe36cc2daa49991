"""Writes one run's directory: samples, failures, checkpoint; moves old and damaged files away."""

import datetime as dt
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from mllm_shapx.records.checkpoint import CheckpointWriter
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.inspection import FaultKind, RunInspection, notes_of
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.run_reader import RunReader, find_runs
from mllm_shapx.records.storage import numbered, write_json

__all__ = ["RunInspection", "RunRecords", "find_runs"]

_HEALED: dict[FaultKind, str] = {
    "leftover": "{} unfinished file(s) of a write that was cut short removed",
    "damaged sample": "{} damaged sample(s) moved to damaged/, to be done again",
    "damaged failure": "{} damaged failure file(s) moved to damaged/, the rows to be done again",
    "damaged derived": "{} damaged file(s) moved to damaged/, to be made again from the samples",
    "outdated failure": "{} failure file(s) removed of rows that have a sample by now",
}


class RunRecords(RunReader):
    """The files of one run below an experiment set's directory. One process writes; any process may read."""

    def heal(self, inspection: RunInspection) -> tuple[str, ...]:
        """Move the damaged files of an inspection away and remove leftovers; return notes.

        Damaged files are moved to `RUN/damaged/`, never deleted. Only the process that holds the directory's
        lock may call this.

        Raises:
            StorageError: When a file cannot be moved or removed.
        """
        findings = []
        for fault in inspection.faults:
            what = fault.path.rpartition("/")[2]
            if fault.kind in {"leftover", "outdated failure"}:
                self.storage.remove(fault.path)
            else:
                what = f"{self.move_aside(fault.path).rpartition('/')[2]} ({fault.reason})"
            findings.append((_HEALED[fault.kind], what))
        return notes_of(self.run_name, findings)

    def checkpoint_writer(
        self, rows_in_order: Sequence[int], inspection: RunInspection | None = None
    ) -> CheckpointWriter:
        """Return the writer of the run's checkpoint; it starts from an inspection's findings."""
        inspection = inspection or RunInspection()
        return CheckpointWriter(
            self.storage,
            self.layout.checkpoint,
            rows_in_order,
            completed=inspection.completed,
            failed=inspection.failed,
            created_at=inspection.created_at,
        )

    def write_spec(self, spec: dict[str, Any]) -> None:
        """Write the resolved config; `records.spec` has the keys that other commands read."""
        write_json(self.storage, self.layout.spec, spec)

    def heal_spec(self) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        """Return the resolved config and notes; a damaged file moves to `damaged/` and counts as missing."""
        try:
            return self.read_usable_spec(), ()
        except ValueError as error:
            kept = self.move_aside(self.layout.spec)
            note = (
                f"{self.run_name}: spec.json was damaged: {error}; it is now {kept}. "
                "The settings that the samples were made with could not be compared"
            )
            return None, (note,)

    def write_sample(self, sample: SampleResult) -> None:
        """Write a sample, its audio first; add the row to the checkpoint only after this."""
        for path, content in sample.audio_files.items():
            self.storage.write_bytes(f"{self.run_name}/{path}", content)
        write_json(self.storage, self.layout.sample(sample.row_index), sample.to_json())

    def write_failure(self, failure: FailureRecord) -> None:
        """Write a row's failed attempts."""
        write_json(self.storage, self.layout.failure(failure.row_index), failure.to_json())

    def clear_failure(self, row_index: int) -> None:
        """Remove a row's failure, if there is one."""
        self.storage.remove(self.layout.failure(row_index))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the aggregate metrics."""
        write_json(self.storage, self.layout.summary, summary)

    def set_aside(self) -> str:
        """Move all of the run's old results to a dated folder; return its name, relative to the run."""
        taken = self.storage.list(self.run_name)
        name = self._free_name()
        # Move samples after the files that depend on them: if interrupted, the next run repeats this.
        for part in ("failures", "summary", "audio", "samples", "checkpoint.json", "spec.json"):
            if part in taken:
                self.storage.move(f"{self.run_name}/{part}", f"{self.run_name}/{name}/{part}")
        return name

    def set_rows_aside(self, rows: Iterable[int]) -> str:
        """Move the samples and recordings of `rows` to a dated folder; return its name."""
        name = self._free_name()
        for row in sorted(rows):
            sample, audio = self.layout.sample(row), self.layout.audio_folder(row)
            # Move the sample last: if interrupted, the next run repeats this.
            for path in (audio, sample):
                if self.storage.exists(path):
                    self.storage.move(
                        path, f"{self.run_name}/{name}/{path.removeprefix(f'{self.run_name}/')}"
                    )
        return name

    def _free_name(self) -> str:
        taken = self.storage.list(self.run_name)
        stamp = f"set_aside_{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}"
        names = itertools.chain([stamp], (f"{stamp}_{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in taken)

    def move_aside(self, path: str) -> str:
        """Move a damaged file to `RUN/damaged/NAME.N`; return that path, relative to the experiment set."""
        target = numbered(self.storage, f"{self.layout.damaged}/{path.rpartition('/')[2]}")
        self.storage.move(path, target)
        return target
