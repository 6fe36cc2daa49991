"""The coordinator: hands out units, takes results and writes them."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mllm_shapx.errors import StorageError
from mllm_shapx.execution.forecast import Forecast
from mllm_shapx.execution.helping import HelpExchange, HelpOffer, HelpReply
from mllm_shapx.execution.ledger import FailureLimits, Ledger, UnitState
from mllm_shapx.execution.messages import (
    Answers,
    Beat,
    Lease,
    LeaseReply,
    Order,
    Study,
    StudyState,
    UnitFailure,
    WorkerInfo,
)
from mllm_shapx.execution.writer import OnSample, ResultWriter
from mllm_shapx.models.base import Answer
from mllm_shapx.models.flight import FEWEST_ROWS
from mllm_shapx.models.server_budget import Spent
from mllm_shapx.planning.units import WorkUnit
from mllm_shapx.records.pace import Pace
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection
from mllm_shapx.reporting.study_progress import WorkerProgress

logger = logging.getLogger(__name__)

PACE_S = 10.0
"""Seconds between two writes of the pace."""


@dataclass(slots=True)
class _Worker:
    """State of a living worker."""

    info: WorkerInfo
    announced: bool = False
    """Whether it has reported its units since this coordinator started."""
    progress_at: float = field(default_factory=time.monotonic)
    beat: Beat | None = None
    """Its last heartbeat."""


class Coordinator:
    """Hands out units, takes results, and alone writes them.

    After a crash, a new coordinator reads the results from the directory, and learns the leases from the
    workers' next calls. Every call may arrive twice.

    Args:
        inspections: Inspection of each run's directory; None to inspect the directories now.
        on_sample: Called with each new sample, once it is on disk.
        failed_before: Quarantined samples at the start of the call; None if the call starts now.
    """

    def __init__(
        self,
        study: Study,
        inspections: Mapping[str, RunInspection] | None = None,
        on_sample: OnSample | None = None,
        failed_before: int | None = None,
    ) -> None:
        self._study = study
        self._notes: list[str] = []
        self._spent = study.server_limits.spent
        self._writer = ResultWriter(study, inspections, on_sample, self._notes.append)
        units = study.units_left(self._writer.runs)
        options = study.options
        is_retry = options.retry_rows is not None
        attempts = {} if is_retry else {unit.unit_id: self._writer.attempts(unit) for unit in units}
        self._ledger = Ledger(units, max_attempts=options.max_attempts, attempts=attempts)
        self._workers: dict[str, _Worker] = {}
        self._lost: set[str] = set()
        self._draining = False
        self._fatal: str | None = None
        self._forecast = Forecast(units)
        self._exchange = HelpExchange()
        self._idle: set[str] = set()
        self._most_workers = 0
        self._paced_at = time.monotonic()
        failed = sum(run.failed_now for run in self._writer.runs.values())
        new = 0 if failed_before is None else max(0, failed - failed_before)
        allowed = options.failures_allowed(len(study.rows) * len(study.runs))
        self._limits = FailureLimits(allowed, new)
        self._check_limits()

    # --- called by workers

    def spent(self) -> Spent:
        """Return what this call has asked of a server, for a new worker that continues the count."""
        return self._spent

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
        # An exchange without answers is no progress: a worker whose model does not return repeats it forever.
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
            attempts, quarantined = self._ledger.attempts(unit.unit_id) + 1, True
        else:
            blame = self._ledger.error(me.worker, unit.unit_id)
            attempts, quarantined = blame.attempts, blame.quarantined
            if quarantined:
                self._limits.gave_up(failure.reason, failure.message)
        self._record_failure(unit, failure, attempts, quarantined=quarantined, by=me)
        self._check_limits()

    def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """Take a heartbeat."""
        if me.worker in self._lost:
            return LeaseReply(None, order="stop")
        state = self._worker(me)
        drop = () if state.announced else tuple(self._ledger.reconcile(me.worker, beat.held))
        state.announced = True
        last = state.beat or Beat((), 0, 0.0)
        # Waiting for a server counts as progress: no row is the cause.
        if beat.answers != last.answers or beat.waiting_for:
            state.progress_at = time.monotonic()
        if bool(beat.waiting_for) != bool(last.waiting_for):
            self._notes.append(f"{me.worker}: {beat.waiting_for or 'the server answers again'}")
        state.beat = beat
        self._spent = max(self._spent, beat.spent, key=lambda spent: spent.requests)
        self._forecast.observe(me.worker, beat)
        if self._forecast.is_order_due():
            self._ledger.reorder(self._forecast.cost)
        self._most_workers = max(self._most_workers, len(self._workers))
        with self._writing():
            if beat.report is not None:
                self._writer.record_report(beat.report)
            self._writer.write_checkpoints(all_of_them=False)
            if time.monotonic() - self._paced_at > PACE_S:
                self._write_pace()
        order: Order = "stop" if self._fatal is not None else "drain" if self._draining else "go"
        return LeaseReply(None, drop=drop, order=order)

    # --- called by the driver

    def worker_lost(self, worker: str, *, innocent: bool, detail: str, log_tail: tuple[str, ...]) -> None:
        """Take back the units of a dead worker; if not `innocent`, charge its death to a row."""
        state = self._workers.pop(worker, None)
        self._lost.add(worker)  # its last calls may arrive after its death; they must not lease anything
        self._idle.discard(worker)
        self._exchange.helper_lost(worker)
        by = WorkerInfo(worker, "", 0, "", "") if state is None else state.info
        message = f"the worker's process died while it explained this row: {detail}"
        for unit_id in self._ledger.held_by(worker):
            self._exchange.close(unit_id)
        for blame in self._ledger.worker_lost(worker, innocent=innocent):
            unit = blame.unit
            self._notes.append(blame.note(worker, detail, self._study.options.max_attempts))
            if blame.charged:
                failure = UnitFailure(unit.unit_id, unit.run_names, "worker_died", message)
                self._record_failure(
                    unit, failure, blame.attempts, quarantined=blame.quarantined, by=by, log_tail=log_tail
                )
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
        late = now - self._study.options.stall_s
        stalled = (name for name in sorted(busy) if self._workers[name].progress_at < late)
        beats = [(state.beat, state.info) for _, state in sorted(self._workers.items())]
        heard = [(beat, info) for beat, info in beats if beat is not None]
        running = self._running()
        runs = self._writer.runs
        return StudyState(
            done={name: run.done_now for name, run in runs.items()},
            failed={name: run.failed_now for name, run in runs.items()},
            total=dict.fromkeys(runs, len(self._study.rows)),
            coalitions_done=self._forecast.settled_answers + sum(answers for _, answers in running),
            coalitions_total=self._forecast.total_answers,
            model_calls=self._writer.model_calls,
            workers=tuple(sorted(self._workers)),
            busy_workers=len(busy),
            finished=self._ledger.is_finished,
            unfinished_units=self._ledger.unfinished,
            draining=self._draining,
            stalled=tuple(stalled),
            device_seconds=self._forecast.device_seconds,
            device_seconds_left=self._forecast.seconds_left(running),
            notes=notes,
            fatal=self._fatal,
            spent=self._spent,
            calls={name: (run.coalitions, run.answers) for name, run in runs.items()},
            store_hits=self._forecast.store_hits,
            worker_list=tuple(self._shown(beat, info) for beat, info in heard),
            worker_answers={info.worker: beat.answers for beat, info in heard},
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
        if self._study.options.rows_in_flight is not None or held < FEWEST_ROWS:
            return False
        return self._ledger.count(UnitState.QUEUED) < held * (len(self._workers) - 1)

    def _handed_out(self, unit: WorkUnit, drop: tuple[str, ...]) -> LeaseReply:
        """Return a lease of the unit's open runs, with the stored answers."""
        with self._writing():
            open_unit = replace(unit, run_names=self._ledger.open_runs(unit.unit_id))
            known = self._writer.known(unit)
            self._forecast.handed_out(unit, len(known.by_mask) + len(known.likelihoods))
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

    def _shown(self, beat: Beat, worker: WorkerInfo) -> WorkerProgress:
        held = (self._ledger.unit(unit_id) for unit_id in self._ledger.held_by(worker.worker))
        return WorkerProgress(
            name=worker.worker,
            node=worker.node,
            device=worker.device,
            rows=tuple(sorted(unit.row_index for unit in held)),
            per_second=None,
            gpu_memory=beat.gpu_memory,
            waiting_for=beat.waiting_for,
        )

    def _running(self) -> list[tuple[WorkUnit, float]]:
        """Return the leased units, each with its number of answers."""
        running = []
        for name, state in self._workers.items():
            answers = {} if state.beat is None else state.beat.unit_answers
            for unit_id, count in answers.items():
                if self._ledger.holds(name, unit_id):
                    unit = self._ledger.unit(unit_id)
                    running.append((unit, min(float(count), unit.cost)))
        return running

    def _settle(self, unit_id: str, run_names: tuple[str, ...]) -> None:
        """Mark runs of a unit as done or quarantined."""
        if self._ledger.settle(unit_id, run_names):
            self._exchange.close(unit_id)
            self._forecast.settled(self._ledger.unit(unit_id))

    # --- failures

    def _record_failure(
        self,
        unit: WorkUnit,
        failure: UnitFailure,
        attempts: int,
        *,
        quarantined: bool,
        by: WorkerInfo,
        log_tail: tuple[str, ...] = (),
    ) -> None:
        """Write the failure of a unit's open runs; if they are quarantined, they are settled."""
        still_open = self._ledger.open_runs(unit.unit_id)
        names = tuple(name for name in failure.run_names if name in still_open)
        self._limits.quarantined += quarantined * len(names)
        with self._writing():
            self._writer.write_failure(
                unit,
                replace(failure, run_names=names),
                attempts=attempts,
                quarantined=quarantined,
                by=by,
                log_tail=log_tail,
            )
            if quarantined:
                self._settle(unit.unit_id, names)

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
