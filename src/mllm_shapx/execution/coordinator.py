"""The coordinator: work queue, leases, and the one writer of the output directory."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mllm_shapx.errors import StorageError
from mllm_shapx.execution.answers import AnswerFiles
from mllm_shapx.execution.environment import record_environment, record_report
from mllm_shapx.execution.forecast import Forecast
from mllm_shapx.execution.ledger import Blame, Ledger, UnitState
from mllm_shapx.execution.left import units_left
from mllm_shapx.execution.messages import (
    Answers,
    Beat,
    Lease,
    LeaseReply,
    Snapshot,
    Study,
    UnitFailure,
    WorkerInfo,
)
from mllm_shapx.execution.sharing import HelpExchange, Offer, OfferReply
from mllm_shapx.explaining.coalitions import REUSED
from mllm_shapx.models.base import Answer, ModelReport
from mllm_shapx.models.flight import FEWEST_ROWS
from mllm_shapx.planning.precision import loaded_warnings
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.checkpoint import CheckpointWriter
from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.pace import Pace, write_pace
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection, RunRecords
from mllm_shapx.records.storage import open_storage

logger = logging.getLogger(__name__)

FAILURES_ALIKE = 10
"""Rows that may fail with the same unforeseen error before anything was explained."""
PACE_S = 10.0
"""Seconds between two notes of what answers cost."""

OnSample = Callable[[SampleResult], None]


@dataclass(slots=True)
class _WorkerState:
    """What is known of a living worker."""

    info: WorkerInfo
    announced: bool = False
    """Whether it has said what it holds since this coordinator started."""
    answers: int = 0
    progress_at: float = field(default_factory=time.monotonic)
    unit_answers: Mapping[str, int] = field(default_factory=dict)
    waiting_for: str = ""


@dataclass(slots=True)
class _RunState:
    """One run's files and rows."""

    records: RunRecords
    checkpoint: CheckpointWriter
    completed: set[int]
    failed: set[int]
    attempts: dict[int, int]
    """Attempts found on disk, of rows that are not completed."""
    failure_files: set[int]
    """Rows with a file below `failures/`."""
    done_now: int
    """Selected rows among `completed`: counting them anew at every look would cost more and more."""
    failed_now: int
    """The same of `failed`."""


class Coordinator:
    """Hands out units, takes results, and writes every file of the output directory.

    Built anew after a crash it finds in the directory what is done, and in the workers' next words what they
    hold. Every call may arrive twice.

    Args:
        study: What is studied.
        inspections: What was found in each run's directory; None to look now.
        on_sample: Told of each new sample, after it is on disk.
        stall_s: Seconds without progress after which a worker that holds units counts as stuck.
        failed_before: Samples that were quarantined when the call began, where that is not now.
    """

    def __init__(
        self,
        study: Study,
        inspections: Mapping[str, RunInspection] | None = None,
        on_sample: OnSample | None = None,
        stall_s: float = 1800.0,
        failed_before: int | None = None,
    ) -> None:
        self._study = study
        self._on_sample = on_sample
        self._stall_s = stall_s
        self._storage = open_storage(study.output_uri)
        self._notes: list[str] = []
        self._rows = frozenset(study.rows)
        self._runs = {run.name: self._open_run(run.name, inspections) for run in study.runs}
        units = units_left(
            study,
            {name: run.completed for name, run in self._runs.items()},
            {name: run.failed for name, run in self._runs.items()},
        )
        self._ledger = Ledger(units, max_attempts=study.max_attempts, attempts=self._attempts(units))
        self._open_runs = {unit.unit_id: list(unit.run_names) for unit in units}
        self._failed_units: set[str] = set()
        self._workers: dict[str, _WorkerState] = {}
        self._gone: set[str] = set()
        self._draining = False
        self._fatal: str | None = None
        self._cost_total = sum(unit.cost for unit in units)
        self._cost_done = 0.0
        self._forecast = Forecast(units, study.players)
        self._model_calls = 0
        self._answer_files: AnswerFiles | None = None
        self._exchange = HelpExchange()
        self._idle: set[str] = set()
        self._environments: set[str] = set()
        self._said: set[str] = set()
        self._has_explained = False
        self._most_workers = 0
        self._paced_at = time.monotonic()
        self._last_reason = ""
        self._alike = 0
        failed = sum(run.failed_now for run in self._runs.values())
        self._quarantined = 0 if failed_before is None else max(0, failed - failed_before)
        self._limit_failures()

    # --- workers

    def lease(self, me: WorkerInfo, held: tuple[str, ...]) -> LeaseReply:
        """Give a worker a unit, after bringing its leases in line with what it says it holds."""
        worker = me.worker
        if worker in self._gone:
            return LeaseReply(None, order="stop")
        state = self._meet(me)
        state.announced = True
        drop = tuple(self._ledger.reconcile(worker, held))
        self._idle.discard(worker)
        if self._fatal is not None or self._ledger.is_finished:
            return LeaseReply(None, drop=drop, order="stop")
        if self._draining:
            return LeaseReply(None, drop=drop, order="drain")
        unit = None if self._has_its_share(len(held)) else self._ledger.lease(worker)
        if unit is not None:
            state.progress_at = time.monotonic()
            return self._handed_out(unit, drop)
        if held or not self._ledger.is_queue_empty:
            return LeaseReply(None, drop=drop)
        task = self._exchange.claim(worker)
        if task is not None:
            state.progress_at = time.monotonic()
        elif not self._exchange.is_helping(worker):
            self._idle.add(worker)
        return LeaseReply(None, help=task, drop=drop)

    def _has_its_share(self, held: int) -> bool:
        """Whether a further row would be at the expense of others, who cannot help with short ones."""
        if self._study.rows_in_flight is not None or held < FEWEST_ROWS:
            return False
        return self._ledger.count(UnitState.QUEUED) < held * (len(self._workers) - 1)

    def exchange(self, me: WorkerInfo, offer: Offer) -> OfferReply:
        """Take an owner's chunks for idle workers and give it what they have answered."""
        state = self._hear(me, offer.unit_id)
        if not self._ledger.holds(me.worker, offer.unit_id):
            return OfferReply()
        row_index = self._ledger.unit(offer.unit_id).row_index
        reply = self._exchange.exchange(offer, row_index, self._helpers(me.worker))
        # Trading alone is no progress: an owner whose model hangs would go on with it for ever.
        if reply.answers:
            state.progress_at = time.monotonic()
        return reply

    def helped(self, me: WorkerInfo, task_id: int, answers: dict[int, Answer]) -> None:
        """Take a helper's answers."""
        if me.worker not in self._gone:
            self._meet(me).progress_at = time.monotonic()
        self._exchange.deliver(task_id, answers)

    def report(self, me: WorkerInfo, unit_id: str, sample: SampleResult, answers: Answers) -> None:
        """Write a sample and the answers behind it; then note it in the checkpoint."""
        self._hear(me, unit_id).progress_at = time.monotonic()
        with self._writing():
            is_last = self._open_runs.get(unit_id) == [sample.run_name]
            self._write_answers(unit_id, answers, is_last=is_last)
            run = self._runs[sample.run_name]
            self._has_explained = True
            if sample.row_index not in run.completed:
                self._write_sample(run, sample)
            self._settle(unit_id, (sample.run_name,))

    def flush(self, me: WorkerInfo, unit_id: str, answers: Answers) -> None:
        """Write answers of a row under way."""
        self._hear(me, unit_id).progress_at = time.monotonic()
        with self._writing():
            self._write_answers(unit_id, answers)

    def fail(self, me: WorkerInfo, failure: UnitFailure) -> None:
        """Record a failure of a unit, or of some of its runs; queue the unit again where that may help."""
        self._hear(me, failure.unit_id).progress_at = time.monotonic()
        worker = me.worker
        if not self._ledger.holds(worker, failure.unit_id):
            return
        unit = self._ledger.unit(failure.unit_id)
        if failure.final:
            attempts = self._ledger.attempts(unit.unit_id) + 1
            quarantined = True
        else:
            blame = self._ledger.error(worker, unit.unit_id)
            attempts, quarantined = blame.attempts, blame.quarantined
        with self._writing():
            self._write_failure(
                unit,
                failure.run_names,
                reason=failure.reason,
                message=failure.message,
                attempts=attempts,
                quarantined=quarantined,
                worker=worker,
                traceback=failure.traceback,
            )
            if quarantined:
                self._settle(unit.unit_id, failure.run_names, failed=True)
                self._suspect_everything(failure)
        self._limit_failures()

    def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """Take a sign of life."""
        if me.worker in self._gone:
            return LeaseReply(None, order="stop")
        state = self._meet(me)
        drop = () if state.announced else tuple(self._ledger.reconcile(me.worker, beat.held))
        state.announced = True
        if beat.answers != state.answers:
            state.progress_at = time.monotonic()
        state.answers = beat.answers
        self._note_waiting(state, beat.waiting_for)
        state.unit_answers = dict(beat.unit_answers)
        if beat.report is not None:
            self._record(beat.report)
        self._forecast.hear(me.worker, beat)
        if self._forecast.is_order_due():
            self._ledger.reorder(self._forecast.cost)
        self._most_workers = max(self._most_workers, len(self._workers))
        with self._writing():
            for run in self._runs.values():
                run.checkpoint.maybe_write()
            if time.monotonic() - self._paced_at > PACE_S:
                self._write_pace()
        if self._fatal is not None:
            return LeaseReply(None, drop=drop, order="stop")
        return LeaseReply(None, drop=drop, order="drain" if self._draining else "go")

    def worker_lost(self, worker: str, *, innocent: bool, detail: str, log_tail: tuple[str, ...]) -> None:
        """Take back what a dead worker held, and record whom its death is charged to."""
        state = self._workers.pop(worker, None)
        # Its last words may come after the news of its death: they lease nothing any more.
        self._gone.add(worker)
        self._idle.discard(worker)
        self._exchange.helper_lost(worker)
        for unit_id in self._ledger.held_by(worker):
            self._exchange.close(unit_id)
        for blame in self._ledger.worker_lost(worker, innocent=innocent):
            self._note_loss(blame, worker, state, detail, log_tail)
        self._limit_failures()

    # --- driver

    def drain(self) -> None:
        """Hand out nothing more."""
        self._draining = True

    def snapshot(self) -> Snapshot:
        """Return how the study stands, with the news since the last call."""
        notes, self._notes = tuple(self._notes), []
        now = time.monotonic()
        busy = {
            worker
            for worker in self._workers
            if self._ledger.held_by(worker) or self._exchange.is_helping(worker)
        }
        stalled = tuple(
            worker for worker in sorted(busy) if now - self._workers[worker].progress_at > self._stall_s
        )
        under_way = self._under_way()
        return Snapshot(
            done={name: run.done_now for name, run in self._runs.items()},
            failed={name: run.failed_now for name, run in self._runs.items()},
            total=dict.fromkeys(self._runs, len(self._rows)),
            coalitions_done=self._cost_done + sum(answers for _, answers in under_way),
            coalitions_total=self._cost_total,
            model_calls=self._model_calls,
            workers=tuple(sorted(self._workers)),
            busy_workers=len(busy),
            finished=self._ledger.is_finished,
            unfinished_units=self._ledger.count(UnitState.QUEUED) + self._ledger.count(UnitState.LEASED),
            draining=self._draining,
            stalled=stalled,
            device_seconds=self._forecast.device_seconds,
            device_seconds_left=self._forecast.seconds_left(under_way),
            notes=notes,
            fatal=self._fatal,
        )

    def finish(self) -> None:
        """Write every checkpoint."""
        with self._writing():
            for run in self._runs.values():
                run.checkpoint.write()
            self._write_pace()

    # --- the inside

    def _note_waiting(self, state: _WorkerState, waiting_for: str) -> None:
        """Say what a worker waits for, once; it is well, and its rows are not to blame."""
        if waiting_for:
            state.progress_at = time.monotonic()
        if bool(waiting_for) != bool(state.waiting_for):
            self._notes.append(f"{state.info.worker}: {waiting_for or 'the server answers again'}")
        state.waiting_for = waiting_for

    def _under_way(self) -> list[tuple[WorkUnit, float]]:
        """Return the units that workers hold, with the answers that each has."""
        return [
            (unit, min(float(count), unit.cost))
            for state in self._workers.values()
            for unit_id, count in state.unit_answers.items()
            if self._ledger.holds(state.info.worker, unit_id)
            for unit in (self._ledger.unit(unit_id),)
        ]

    def _write_pace(self) -> None:
        """Leave behind what answers cost, for `plan`."""
        self._paced_at = time.monotonic()
        seconds = self._forecast.pace(self._under_way())
        if seconds:
            write_pace(self._storage, Pace(max(1, self._most_workers), seconds))

    def _open_run(self, name: str, inspections: Mapping[str, RunInspection] | None) -> _RunState:
        records = RunRecords(self._storage, name)
        if inspections is None:
            inspection = records.inspect(self._study.rows)
            self._notes.extend(inspection.notes)
        else:
            inspection = inspections[name]
        return _RunState(
            records,
            records.checkpoint_writer(self._study.rows, inspection),
            completed=set(inspection.completed),
            failed=set(inspection.failed),
            attempts=dict(inspection.attempts),
            failure_files=set(inspection.attempts),
            done_now=len(inspection.completed & self._rows),
            failed_now=len(inspection.failed & self._rows),
        )

    def _attempts(self, units: list[WorkUnit]) -> dict[str, int]:
        if self._study.retry_rows is not None:
            return {}
        return {
            unit.unit_id: max(self._runs[name].attempts.get(unit.row_index, 0) for name in unit.run_names)
            for unit in units
        }

    def _handed_out(self, unit: WorkUnit, drop: tuple[str, ...]) -> LeaseReply:
        """Return a lease on the runs of a unit that are still open, with the answers that are stored."""
        with self._writing():
            open_unit = replace(unit, run_names=tuple(self._open_runs[unit.unit_id]))
            known = self._known(unit)
            self._forecast.handed_out(unit, len(known.by_mask) + len(known.likelihoods))
            return LeaseReply(Lease(open_unit, known), drop=drop)
        return LeaseReply(None, drop=drop, order="stop")

    def _known(self, unit: WorkUnit) -> Answers:
        if self._answer_files is None:
            return Answers()
        answers, notes = self._answer_files.read(unit)
        self._notes.extend(notes)
        return answers

    def _write_sample(self, run: _RunState, sample: SampleResult) -> None:
        row = sample.row_index
        run.records.write_sample(sample)
        if row in run.failure_files:
            run.records.clear_failure(row)
            run.failure_files.discard(row)
        run.completed.add(row)
        if row in run.failed:
            run.failed.discard(row)
            run.failed_now -= row in self._rows
        run.done_now += row in self._rows
        run.checkpoint.complete(row)
        run.checkpoint.maybe_write()
        if self._on_sample is not None:
            self._on_sample(sample)

    def _write_answers(self, unit_id: str, answers: Answers, *, is_last: bool = False) -> None:
        """Write new answers and vectors of a unit; with its last sample they are packed into one file."""
        # A unit that is not open is done: its answers are on disk already.
        if self._answer_files is None or unit_id not in self._open_runs:
            return
        unit = self._ledger.unit(unit_id)
        if is_last:
            self._notes.extend(self._answer_files.close(unit, answers))
        elif answers.by_mask:
            self._answer_files.add(unit, answers)
        self._model_calls += sum(stored.asked_by != REUSED for stored in answers.by_mask.values())
        self._model_calls += len(answers.likelihoods)
        if answers.likelihoods:
            self._notes.extend(self._answer_files.add_likelihoods(unit, answers))
        if answers.vectors:
            self._notes.extend(self._answer_files.add_vectors(unit, answers))

    def _settle(self, unit_id: str, run_names: tuple[str, ...], *, failed: bool = False) -> None:
        """Note that some runs of a unit are done, or given up; with the last of them the unit is."""
        still_open = self._open_runs.get(unit_id)
        if still_open is None:
            return
        still_open[:] = [name for name in still_open if name not in run_names]
        if failed:
            self._failed_units.add(unit_id)
        if still_open:
            return
        del self._open_runs[unit_id]
        self._exchange.close(unit_id)
        self._cost_done += self._ledger.unit(unit_id).cost
        self._forecast.settled(self._ledger.unit(unit_id))
        if unit_id in self._failed_units:
            self._ledger.quarantine(unit_id)
        else:
            self._ledger.complete(unit_id)

    def _note_loss(
        self,
        blame: Blame,
        worker: str,
        state: _WorkerState | None,
        detail: str,
        log_tail: tuple[str, ...],
    ) -> None:
        row = blame.unit.row_index
        if not blame.charged:
            self._notes.append(f"row {row} goes back to the queue: worker {worker} is gone ({detail})")
            return
        open_runs = tuple(sorted(self._open_runs.get(blame.unit.unit_id, ())))
        verdict = "given up" if blame.quarantined else "tried again"
        self._notes.append(
            f"row {row} was alone in worker {worker} when it died (attempt {blame.attempts} of "
            f"{self._study.max_attempts}, {verdict}): {detail}"
        )
        with self._writing():
            self._write_failure(
                blame.unit,
                open_runs,
                reason="worker_died",
                message=f"the worker's process died while it explained this row: {detail}",
                attempts=blame.attempts,
                quarantined=blame.quarantined,
                worker=worker,
                node=None if state is None else state.info.node,
                log_tail=log_tail,
            )
            if blame.quarantined:
                self._settle(blame.unit.unit_id, open_runs, failed=True)

    def _write_failure(
        self,
        unit: WorkUnit,
        run_names: tuple[str, ...],
        *,
        reason: str,
        message: str,
        attempts: int,
        quarantined: bool,
        worker: str,
        node: str | None = None,
        traceback: str | None = None,
        log_tail: tuple[str, ...] = (),
    ) -> None:
        state = self._workers.get(worker)
        node = node or (state.info.node if state is not None else None)
        for name in run_names:
            if name not in self._open_runs.get(unit.unit_id, ()):
                continue
            run = self._runs[name]
            run.records.write_failure(
                FailureRecord(
                    row_index=unit.row_index,
                    run_name=name,
                    reason=reason,
                    message=message,
                    attempts=attempts,
                    quarantined=quarantined,
                    node=node,
                    worker=worker,
                    traceback=traceback,
                    log_tail=log_tail,
                    at=time.time(),
                )
            )
            run.failure_files.add(unit.row_index)
            if quarantined:
                run.failed_now += unit.row_index not in run.failed
                run.failed.add(unit.row_index)
                self._quarantined += 1
                run.checkpoint.fail(unit.row_index)
                run.checkpoint.maybe_write()
                self._notes.append(f"{name}: row {unit.row_index} is quarantined: {reason}: {message}")

    def _helpers(self, owner: str) -> set[str]:
        """Return the workers beside `owner` that help, or could.

        Once no unit is left to take, that is at least one: who ends next finds something to do at once.
        """
        if not self._ledger.is_queue_empty:
            return set()
        others = self._workers.keys() - {owner}
        return (self._idle | self._exchange.helping) & others or set(sorted(others)[:1])

    def _suspect_everything(self, failure: UnitFailure) -> None:
        """Stop a study in which nothing works: rows that fail alike, and none that was explained."""
        if failure.final or self._has_explained:
            return
        self._alike = self._alike + 1 if failure.reason == self._last_reason else 1
        self._last_reason = failure.reason
        if self._alike >= FAILURES_ALIKE:
            self._stop_early(
                f"the first {self._alike} rows all failed with {failure.reason}: {failure.message}; stopping "
                "early. Mend the cause, then try them again with retry"
            )

    def _stop_early(self, reason: str) -> None:
        """Hand out nothing more because of `reason`."""
        self._notes.append(reason)
        self._draining = True

    def _limit_failures(self) -> None:
        """Stop a study in which more samples were quarantined than the call allows."""
        allowed = self._study.failures_allowed
        if allowed is not None and self._quarantined > allowed and not self._draining:
            self._stop_early(
                f"{self._quarantined} sample(s) were quarantined and {allowed} are allowed; stopping early"
            )

    def _meet(self, me: WorkerInfo) -> _WorkerState:
        """Return what is known of a worker; it is met anew when the coordinator was restarted."""
        if self._answer_files is None:
            self._answer_files = AnswerFiles(
                self._storage, self._study.runs, self._study.model_commit, me.dtype
            )
            self._notes.extend(f"warning: {each}" for each in loaded_warnings(self._study.runs, me.dtype))
        if me.environment is not None and me.environment.id not in self._environments:
            self._environments.add(me.environment.id)
            with self._writing():
                counts = [(run.records, len(run.completed)) for run in self._runs.values()]
                warning = record_environment(counts, me.environment)
                self._notes += [] if warning is None else [warning]
        return self._workers.setdefault(me.worker, _WorkerState(me))

    def _record(self, report: ModelReport) -> None:
        """Say what a model has to say of itself, once, and keep it in the specs."""
        new = [note for note in report.notes if note not in self._said]
        self._said.update(new)
        self._notes += [f"note: {note}" for note in new]
        with self._writing():
            record_report((run.records for run in self._runs.values()), report)

    def _hear(self, me: WorkerInfo, unit_id: str) -> _WorkerState:
        """Return what is known of a worker that speaks of a unit, which it therefore holds.

        A coordinator that was started again takes its word for it, before it says so itself.
        """
        if me.worker in self._gone:
            return _WorkerState(me)
        state = self._meet(me)
        if not state.announced:
            self._ledger.claim(me.worker, unit_id)
        return state

    def _writing(self) -> "_Writing":
        return _Writing(self)

    def give_up(self, error: StorageError) -> None:
        """Stop the study: results cannot be written any more."""
        self._fatal = str(error)


class _Writing:
    """Turns a failed write into the end of the study instead of the end of the coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, StorageError):
            logger.error("%s", error)
            self._coordinator.give_up(error)
            return True
        return False
