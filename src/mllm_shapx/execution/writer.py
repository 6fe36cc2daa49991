"""The results of a study on disk: samples, failures, checkpoints, stored answers, the pace."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mllm_shapx.execution.answers import AnswerFiles
from mllm_shapx.execution.messages import Answers, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.spec_content import record_environment, record_report
from mllm_shapx.explaining.coalitions import REUSED
from mllm_shapx.models.base import ModelReport
from mllm_shapx.planning.precision import loaded_warnings
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.checkpoint import CheckpointWriter
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.pace import Pace, write_pace
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection, RunRecords
from mllm_shapx.records.storage import open_storage

OnSample = Callable[[SampleResult], None]


@dataclass(slots=True)
class RunResults:
    """One run's files and rows."""

    records: RunRecords
    checkpoint: CheckpointWriter
    completed: set[int]
    failed: set[int]
    attempts: dict[int, int]
    """Attempts found on disk, for rows without a sample."""
    failure_files: set[int]
    """Rows with a file in `failures/`."""
    done_now: int
    """Selected rows among `completed`. Cached: recounting is O(rows) for each state."""
    failed_now: int
    """The same for `failed`."""
    coalitions: int
    """Coalitions of the samples of selected rows."""
    answers: int
    """Answers that the model gave for these samples."""


class ResultWriter:
    """Writes the results of one study and keeps track of them.

    Methods raise `StorageError` when a file cannot be written or read.

    Args:
        inspections: Inspection of each run's directory; None to inspect the directories now.
        on_sample: Called with each new sample, once it is on disk.
        note: Called with each message for the user, a sentence.
    """

    def __init__(
        self,
        study: Study,
        inspections: Mapping[str, RunInspection] | None,
        on_sample: OnSample | None,
        note: Callable[[str], None],
    ) -> None:
        self.model_calls = 0
        """Written answers and likelihoods that the model gave since the start."""
        self._study = study
        self._on_sample = on_sample
        self._note = note
        self._storage = open_storage(study.output_uri)
        self._rows = frozenset(study.rows)
        self.runs = {run.name: self._open(run.name, inspections) for run in study.runs}
        self._answers: AnswerFiles | None = None
        self._environments: set[str] = set()
        self._model_notes: set[str] = set()

    def _open(self, name: str, inspections: Mapping[str, RunInspection] | None) -> RunResults:
        records = RunRecords(self._storage, name)
        if inspections is None:
            inspection = records.inspect(self._study.rows)
            for note in (*records.heal(inspection), *inspection.notes):
                self._note(note)
        else:
            inspection = inspections[name]
        calls = [counts for row, counts in inspection.calls.items() if row in self._rows]
        return RunResults(
            records,
            records.checkpoint_writer(self._study.rows, inspection),
            completed=set(inspection.completed),
            failed=set(inspection.failed),
            attempts=dict(inspection.attempts),
            failure_files=set(inspection.attempts),
            done_now=len(inspection.completed & self._rows),
            failed_now=len(inspection.failed & self._rows),
            coalitions=sum(coalitions for coalitions, _ in calls),
            answers=sum(answers for _, answers in calls),
        )

    # --- state

    def attempts(self, unit: WorkUnit) -> int:
        """Return the attempts of a unit in earlier calls."""
        return max(self.runs[name].attempts.get(unit.row_index, 0) for name in unit.run_names)

    def known(self, unit: WorkUnit) -> Answers:
        """Return the stored answers of a unit."""
        if self._answers is None:
            return Answers()
        answers, notes = self._answers.read(unit)
        for note in notes:
            self._note(note)
        return answers

    # --- writing

    def welcome(self, worker: WorkerInfo) -> None:
        """Record a worker's environment; the first worker decides the dtype of the answers."""
        if self._answers is None:
            self._answers = AnswerFiles(
                self._storage, self._study.runs, self._study.model_commit, worker.dtype
            )
            for each in loaded_warnings(self._study.runs, worker.dtype):
                self._note(f"warning: {each}")
        environment = worker.environment
        if environment is None or environment.id in self._environments:
            return
        self._environments.add(environment.id)
        counts = [(run.records, len(run.completed)) for run in self.runs.values()]
        if (warning := record_environment(counts, environment)) is not None:
            self._note(warning)

    def record_report(self, report: ModelReport) -> None:
        """Show each of a model's notes once, and write the report to the specs."""
        for note in report.notes:
            if note not in self._model_notes:
                self._model_notes.add(note)
                self._note(f"note: {note}")
        record_report((run.records for run in self.runs.values()), report)

    def write_sample(self, sample: SampleResult) -> None:
        """Write a sample, unless the row has one, and add it to the checkpoint."""
        row, run = sample.row_index, self.runs[sample.run_name]
        if row in run.completed:
            return
        run.records.write_sample(sample)
        if row in run.failure_files:
            run.records.clear_failure(row)
            run.failure_files.discard(row)
        run.completed.add(row)
        run.coalitions += sample.n_calls
        run.answers += sample.model_calls
        if row in run.failed:
            run.failed.discard(row)
            run.failed_now -= row in self._rows
        run.done_now += row in self._rows
        run.checkpoint.complete(row)
        run.checkpoint.maybe_write()
        if self._on_sample is not None:
            self._on_sample(sample)

    def write_answers(self, unit: WorkUnit, answers: Answers, *, is_last: bool) -> None:
        """Write a unit's new answers; with the last ones, pack all into one file."""
        if self._answers is None:
            return
        notes = self._answers.write(unit, answers, is_last=is_last)
        self.model_calls += sum(stored.asked_by != REUSED for stored in answers.by_mask.values())
        self.model_calls += len(answers.likelihoods)
        for note in notes:
            self._note(note)

    def write_failure(
        self,
        unit: WorkUnit,
        failure: UnitFailure,
        *,
        attempts: int,
        quarantined: bool,
        by: WorkerInfo,
        log_tail: tuple[str, ...],
    ) -> None:
        """Write the failure of a unit's runs in the worker `by`, one file per run."""
        row = unit.row_index
        for name in failure.run_names:
            run = self.runs[name]
            run.records.write_failure(
                FailureRecord(
                    row_index=row,
                    run_name=name,
                    reason=failure.reason,
                    message=failure.message,
                    attempts=attempts,
                    quarantined=quarantined,
                    node=by.node or None,
                    worker=by.worker,
                    traceback=failure.traceback,
                    log_tail=log_tail,
                    at=time.time(),
                )
            )
            run.failure_files.add(row)
            if quarantined:
                run.failed_now += row not in run.failed
                run.failed.add(row)
                run.checkpoint.fail(row)
                run.checkpoint.maybe_write()
                self._note(f"{name}: row {row} is quarantined: {failure.reason}: {failure.message}")

    def write_checkpoints(self, *, all_of_them: bool) -> None:
        """Write the checkpoints that are due, or all of them."""
        for run in self.runs.values():
            if all_of_them:
                run.checkpoint.write()
            else:
                run.checkpoint.maybe_write()

    def write_pace(self, pace: Pace) -> None:
        """Keep the measured seconds per answer for `plan`."""
        write_pace(self._storage, pace)
