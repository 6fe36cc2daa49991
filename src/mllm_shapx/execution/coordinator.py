"""The coordinator: hands out units, takes results and writes them."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mllm_shapx.errors import StorageError
from mllm_shapx.execution.forecast import Forecast
from mllm_shapx.execution.helping import HelpExchange, HelpOffer, HelpReply
from mllm_shapx.execution.ledger import Blame, FailureLimits, Ledger, UnitState
from mllm_shapx.execution.messages import (
    Answers,
    Beat,
    Lease,
    LeaseReply,
    Study,
    StudyState,
    UnitFailure,
    WorkerInfo,
)
from mllm_shapx.execution.tally import Tally
from mllm_shapx.execution.writer import OnSample, ResultWriter
from mllm_shapx.models.base import Answer
from mllm_shapx.models.flight import FEWEST_ROWS
from mllm_shapx.models.server_budget import Spent
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.pace import Pace
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection

logger = logging.getLogger(__name__)

PACE_S = 10.0
"""Seconds between two writes of the pace."""


@dataclass(slots=True)
class _Worker:
    """State of a living worker."""

    info: WorkerInfo
    announced: bool = False
    """Whether it has reported its units since this coordinator started."""
    answers: int = 0
    progress_at: float = field(default_factory=time.monotonic)
    unit_answers: Mapping[str, int] = field(default_factory=dict)
    waiting_for: str = ""


class Coordinator:
    """Hands out units, takes results, and alone writes them.

    After a crash, a new coordinator reads the results from the directory, and learns the leases from the
    workers' next calls. Every call may arrive twice.

    Args:
        study: The study.
        inspections: Inspection of each run's directory; None to inspect the directories now.
        on_sample: Called with each new sample, once it is on disk.
        stall_s: Seconds without progress after which a worker that holds units counts as stuck.
        failed_before: Quarantined samples at the start of the call; None if the call starts now.
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
        self._stall_s = stall_s
        self._notes: list[str] = []
        self._tally = Tally(study.server_limits.spent)
        self._writer = ResultWriter(study, inspections, on_sample, self._notes.append, self._tally)
        units = study.units_left(self._writer.completed, self._writer.failed)
        is_retry = study.retry_rows is not None
        attempts = {} if is_retry else {unit.unit_id: self._writer.attempts(unit) for unit in units}
        self._ledger = Ledger(units, max_attempts=study.max_attempts, attempts=attempts)
        self._workers: dict[str, _Worker] = {}
        self._lost: set[str] = set()
        self._draining = False
        self._fatal: str | None = None
        self._forecast = Forecast(units)
        self._exchange = HelpExchange()
        self._idle: set[str] = set()
        self._most_workers = 0
        self._paced_at = time.monotonic()
        failed = sum(self._writer.failed_now.values())
        self._limits = FailureLimits(
            study.failures_allowed, 0 if failed_before is None else max(0, failed - failed_before)
        )
        self._check_limits()

    # --- called by workers

    def spent(self) -> Spent:
        """Return what this call has asked of a server, for a worker that goes on counting."""
        return self._tally.spent

    def lease(self, me: WorkerInfo, held: tuple[str, ...]) -> LeaseReply:
        """Give a worker a unit, or coalitions of another worker's row. Of its leases, only `held` stay."""
        worker = me.worker
        if worker in self._lost:
            return LeaseReply(None, order="stop")
        state = self._worker(me)
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

    def exchange(self, me: WorkerInfo, offer: HelpOffer) -> HelpReply:
        """Take coalitions of a worker's row for idle workers; return the helpers' answers."""
        state = self._holder(me, offer.unit_id)
        if not self._ledger.holds(me.worker, offer.unit_id):
            return HelpReply()
        unit = self._ledger.unit(offer.unit_id)
        reply = self._exchange.exchange(offer, unit.row_index, self._helpers(me.worker))
        # An exchange without answers is no progress: a worker with a hanging model repeats it forever.
        if reply.answers:
            state.progress_at = time.monotonic()
        return reply

    def helped(self, me: WorkerInfo, task_id: int, answers: dict[int, Answer]) -> None:
        """Take a helper's answers."""
        if me.worker not in self._lost:
            self._worker(me).progress_at = time.monotonic()
        self._exchange.deliver(task_id, answers)

    def report(self, me: WorkerInfo, unit_id: str, sample: SampleResult, answers: Answers) -> None:
        """Write a sample and its new answers."""
        self._holder(me, unit_id).progress_at = time.monotonic()
        with self._writing():
            is_last = self._ledger.open_runs(unit_id) == (sample.run_name,)
            self._write_answers(unit_id, answers, is_last=is_last)
            self._limits.has_explained = True
            self._writer.write_sample(sample)
            self._settle(unit_id, (sample.run_name,))

    def flush(self, me: WorkerInfo, unit_id: str, answers: Answers) -> None:
        """Write answers of a running row."""
        self._holder(me, unit_id).progress_at = time.monotonic()
        with self._writing():
            self._write_answers(unit_id, answers, is_last=False)

    def fail(self, me: WorkerInfo, failure: UnitFailure) -> None:
        """Record a failure of a unit or of some of its runs; queue the unit again if a retry may help."""
        self._holder(me, failure.unit_id).progress_at = time.monotonic()
        if not self._ledger.holds(me.worker, failure.unit_id):
            return
        unit = self._ledger.unit(failure.unit_id)
        if failure.final:
            attempts = self._ledger.attempts(unit.unit_id) + 1
            quarantined = True
        else:
            blame = self._ledger.error(me.worker, unit.unit_id)
            attempts, quarantined = blame.attempts, blame.quarantined
        with self._writing():
            self._write_failure(unit, failure, attempts, quarantined=quarantined, by=me)
            if quarantined:
                self._settle(unit.unit_id, failure.run_names, failed=True)
                if not failure.final:
                    self._limits.gave_up(failure.reason, failure.message)
        self._check_limits()

    def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """Take a heartbeat."""
        if me.worker in self._lost:
            return LeaseReply(None, order="stop")
        state = self._worker(me)
        drop = () if state.announced else tuple(self._ledger.reconcile(me.worker, beat.held))
        state.announced = True
        if beat.answers != state.answers:
            state.progress_at = time.monotonic()
        state.answers = beat.answers
        self._note_waiting(state, beat.waiting_for)
        state.unit_answers = dict(beat.unit_answers)
        self._forecast.observe(me.worker, beat)
        self._tally.hear(me, beat)
        if self._forecast.is_order_due():
            self._ledger.reorder(self._forecast.cost)
        self._most_workers = max(self._most_workers, len(self._workers))
        with self._writing():
            if beat.report is not None:
                self._writer.record_report(beat.report)
            self._writer.write_checkpoints(all_of_them=False)
            if time.monotonic() - self._paced_at > PACE_S:
                self._write_pace()
        if self._fatal is not None:
            return LeaseReply(None, drop=drop, order="stop")
        return LeaseReply(None, drop=drop, order="drain" if self._draining else "go")

    # --- called by the driver

    def worker_lost(self, worker: str, *, innocent: bool, detail: str, log_tail: tuple[str, ...]) -> None:
        """Take back the units of a dead worker; if not `innocent`, charge its death to a row."""
        state = self._workers.pop(worker, None)
        # Its last calls may arrive after its death; they must not lease anything.
        self._lost.add(worker)
        self._idle.discard(worker)
        self._exchange.helper_lost(worker)
        info = WorkerInfo(worker, "", 0, "", "") if state is None else state.info
        for unit_id in self._ledger.held_by(worker):
            self._exchange.close(unit_id)
        for blame in self._ledger.worker_lost(worker, innocent=innocent):
            self._record_loss(blame, info, detail, log_tail)
        self._check_limits()

    def drain(self) -> None:
        """Hand out nothing more."""
        self._draining = True

    def state(self) -> StudyState:
        """Return the state of the study, with the notes since the last call."""
        notes, self._notes[:] = tuple(self._notes), []
        now = time.monotonic()
        busy = {
            name for name in self._workers if self._ledger.held_by(name) or self._exchange.is_helping(name)
        }
        stalled = (name for name in sorted(busy) if now - self._workers[name].progress_at > self._stall_s)
        running = self._running()
        done = self._writer.done_now
        return StudyState(
            done=done,
            failed=self._writer.failed_now,
            total=dict.fromkeys(done, len(self._study.rows)),
            coalitions_done=self._forecast.settled_answers + sum(answers for _, answers in running),
            coalitions_total=self._forecast.total_answers,
            model_calls=self._writer.model_calls,
            workers=tuple(sorted(self._workers)),
            busy_workers=len(busy),
            finished=self._ledger.is_finished,
            unfinished_units=self._ledger.count(UnitState.QUEUED) + self._ledger.count(UnitState.LEASED),
            draining=self._draining,
            stalled=tuple(stalled),
            device_seconds=self._forecast.device_seconds,
            device_seconds_left=self._forecast.seconds_left(running),
            notes=notes,
            fatal=self._fatal,
            spent=self._tally.spent,
            tally=self._tally.now(self._workers, self._ledger),
        )

    def finish(self) -> None:
        """Write every checkpoint, and the pace."""
        with self._writing():
            self._writer.write_checkpoints(all_of_them=True)
            self._write_pace()

    # --- workers and their units

    def _worker(self, me: WorkerInfo) -> _Worker:
        """Return the worker's state; at its first call, record its environment."""
        with self._writing():
            self._writer.welcome(me)
        return self._workers.setdefault(me.worker, _Worker(me))

    def _holder(self, me: WorkerInfo, unit_id: str) -> _Worker:
        """Return the worker's state; after a restart, assign the unit to it."""
        if me.worker in self._lost:
            return _Worker(me)
        state = self._worker(me)
        if not state.announced:
            self._ledger.claim(me.worker, unit_id)
        return state

    def _has_its_share(self, held: int) -> bool:
        """Whether one more row would leave too few for other workers, which cannot help with short rows."""
        if self._study.rows_in_flight is not None or held < FEWEST_ROWS:
            return False
        return self._ledger.count(UnitState.QUEUED) < held * (len(self._workers) - 1)

    def _handed_out(self, unit: WorkUnit, drop: tuple[str, ...]) -> LeaseReply:
        """Return a lease of the unit's open runs, with the stored answers."""
        with self._writing():
            open_unit = replace(unit, run_names=self._ledger.open_runs(unit.unit_id))
            known = self._writer.known(unit)
            stored = len(known.by_mask) + len(known.likelihoods)
            self._forecast.handed_out(unit, stored)
            self._tally.handed_out(unit, stored)
            return LeaseReply(Lease(open_unit, known), drop=drop)
        return LeaseReply(None, drop=drop, order="stop")

    def _helpers(self, owner: str) -> set[str]:
        """Return the workers besides `owner` that help, or could help.

        With an empty queue this is at least one: the next worker that ends its unit can help.
        """
        if not self._ledger.is_queue_empty:
            return set()
        others = self._workers.keys() - {owner}
        return (self._idle | self._exchange.helping) & others or set(sorted(others)[:1])

    def _note_waiting(self, worker: _Worker, waiting_for: str) -> None:
        """Report once why a worker waits. Waiting counts as progress: no row is the cause."""
        if waiting_for:
            worker.progress_at = time.monotonic()
        if bool(waiting_for) != bool(worker.waiting_for):
            self._notes.append(f"{worker.info.worker}: {waiting_for or 'the server answers again'}")
        worker.waiting_for = waiting_for

    def _running(self) -> list[tuple[WorkUnit, float]]:
        """Return the leased units, each with its number of answers."""
        return [
            (unit, min(float(count), unit.cost))
            for state in self._workers.values()
            for unit_id, count in state.unit_answers.items()
            if self._ledger.holds(state.info.worker, unit_id)
            for unit in (self._ledger.unit(unit_id),)
        ]

    def _settle(self, unit_id: str, run_names: tuple[str, ...], *, failed: bool = False) -> None:
        """Mark runs of a unit as done or quarantined."""
        if self._ledger.settle(unit_id, run_names, failed=failed):
            self._exchange.close(unit_id)
            self._forecast.settled(self._ledger.unit(unit_id))

    # --- failures

    def _record_loss(self, blame: Blame, worker: WorkerInfo, detail: str, log_tail: tuple[str, ...]) -> None:
        unit = blame.unit
        self._notes.append(blame.note(worker.worker, detail, self._study.max_attempts))
        if not blame.charged:
            return
        open_runs = tuple(sorted(self._ledger.open_runs(unit.unit_id)))
        failure = UnitFailure.of_lost_worker(unit.unit_id, open_runs, detail)
        with self._writing():
            self._write_failure(
                unit, failure, blame.attempts, quarantined=blame.quarantined, by=worker, log_tail=log_tail
            )
            if blame.quarantined:
                self._settle(unit.unit_id, failure.run_names, failed=True)

    def _check_limits(self) -> None:
        """Hand out nothing more after too many failures."""
        if not self._draining and (reason := self._limits.reason_to_stop) is not None:
            self._notes.append(reason)
            self._draining = True

    # --- writing

    def _write_answers(self, unit_id: str, answers: Answers, *, is_last: bool) -> None:
        # A unit without open runs is done: its answers are on disk.
        if self._ledger.open_runs(unit_id):
            self._writer.write_answers(self._ledger.unit(unit_id), answers, is_last=is_last)

    def _write_failure(
        self,
        unit: WorkUnit,
        failure: UnitFailure,
        attempts: int,
        *,
        quarantined: bool,
        by: WorkerInfo,
        log_tail: tuple[str, ...] = (),
    ) -> None:
        still_open = self._ledger.open_runs(unit.unit_id)
        names = tuple(name for name in failure.run_names if name in still_open)
        self._limits.quarantined += quarantined * len(names)
        self._writer.write_failure(
            unit,
            replace(failure, run_names=names),
            attempts=attempts,
            quarantined=quarantined,
            worker=by.worker,
            node=by.node or None,
            log_tail=log_tail,
        )

    def _write_pace(self) -> None:
        self._paced_at = time.monotonic()
        if seconds := self._forecast.pace(self._running()):
            self._writer.write_pace(Pace(max(1, self._most_workers), seconds))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Let a failed write end the study, not the coordinator."""
        try:
            yield
        except StorageError as error:
            logger.error("%s", error)  # noqa: TRY400 -- the message suffices
            self._fatal = str(error)
