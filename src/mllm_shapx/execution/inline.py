"""The same work in one process without Ray: for a debugger, for tests, for tiny jobs."""

import asyncio
import time

from mllm_shapx.errors import ShapxError, StorageError, StudyError, first_of
from mllm_shapx.execution.aggregator import Aggregator
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.messages import Answers, Beat, LeaseReply, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, ended
from mllm_shapx.execution.preparation import OpenOutput
from mllm_shapx.execution.progress import ProgressFeed
from mllm_shapx.execution.sharing import Offer, OfferReply
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.execution.worker import DeviceLostError, Worker
from mllm_shapx.models.base import Answer
from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.progress import ProgressReporter

STOP_S = 3.0
"""Seconds that rows get to be left where they are; a thread that does not return is left to itself."""


class DirectDesk:
    """The coordinator in the same process as the worker."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def lease(self, me: WorkerInfo, held: tuple[str, ...]) -> LeaseReply:
        """Ask for a unit."""
        return self._coordinator.lease(me, held)

    async def report(self, me: WorkerInfo, unit_id: str, sample: SampleResult, answers: Answers) -> None:
        """Hand in a sample."""
        self._coordinator.report(me, unit_id, sample, answers)

    async def flush(self, me: WorkerInfo, unit_id: str, answers: Answers) -> None:
        """Hand in answers."""
        self._coordinator.flush(me, unit_id, answers)

    async def fail(self, me: WorkerInfo, failure: UnitFailure) -> None:
        """Hand in a failure."""
        self._coordinator.fail(me, failure)

    async def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """Give a sign of life."""
        return self._coordinator.beat(me, beat)

    async def exchange(self, me: WorkerInfo, offer: Offer) -> OfferReply:
        """Offer coalitions to idle workers."""
        return self._coordinator.exchange(me, offer)

    async def helped(self, me: WorkerInfo, task_id: int, answers: dict[int, Answer]) -> None:
        """Hand in answers to another worker's coalitions."""
        self._coordinator.helped(me, task_id, answers)


def run_inline(
    study: Study,
    options: RunOptions,
    output: OpenOutput,
    reporter: ProgressReporter,
    request: StopRequest,
) -> StudyOutcome:
    """Explain everything in this process with one worker.

    Raises:
        ModelError: When the model cannot be loaded.
        StorageError: When results cannot be written any more.
        OutputError: When another driver has taken the output directory.
    """
    runner = asyncio.Runner()
    try:
        outcome = runner.run(_run(study, options, output, reporter, request))
    except Exception:
        runner.close()
        raise
    # After a signal the runner is left as it is: closing it would wait for the model.
    if request.signal is None:
        runner.close()
    return outcome


async def _let_end(work: asyncio.Task[None]) -> None:
    """Wait for the worker.

    Raises:
        ShapxError: When its device broke: only another process may have more luck.
    """
    try:
        await work
    except ExceptionGroup as group:
        if group.subgroup(DeviceLostError) is None:
            raise
        reason = "the device does not work any more in this process"
        raise ShapxError(
            f"{reason}: {first_of(group)}. What was written is valid; go on with --resume"
        ) from group


async def _run(
    study: Study,
    options: RunOptions,
    output: OpenOutput,
    reporter: ProgressReporter,
    request: StopRequest,
) -> StudyOutcome:
    started = time.monotonic()
    aggregator = Aggregator(study, output.specs, output.inspections)
    coordinator = Coordinator(study, output.inspections, aggregator.log, options.stall_s)
    snapshot = coordinator.snapshot()
    feed = ProgressFeed(reporter)
    if not snapshot.finished:
        worker = Worker("inline", study, DirectDesk(coordinator))
        work = asyncio.create_task(worker.run())
        deadline: float | None = None
        while not work.done():
            await asyncio.wait([work], timeout=0.25)
            output.lock.check()
            snapshot = coordinator.snapshot()
            feed.show(snapshot)
            if request.signal is not None and deadline is None:
                reporter.message(request.announcement(options.grace_s))
                coordinator.drain()
                await worker.flush()
                deadline = time.monotonic() + request.grace_s(options.grace_s)
            if deadline is not None and time.monotonic() > deadline:
                await worker.stop()
                await asyncio.wait([work], timeout=STOP_S)
                break
        if work.done():
            try:
                await _let_end(work)
            except StudyError:
                coordinator.finish()
                raise
    coordinator.finish()
    snapshot = coordinator.snapshot()
    feed.show(snapshot)
    if snapshot.fatal is not None:
        raise StorageError(snapshot.fatal)
    warnings = aggregator.finish()
    return StudyOutcome(
        experiment_set_id=study.experiment_set_id,
        output_uri=study.output_uri,
        done=dict(snapshot.done),
        failed=dict(snapshot.failed),
        total=dict(snapshot.total),
        model_calls=snapshot.model_calls,
        seconds=time.monotonic() - started,
        exit_code=request.exit_code
        if request.signal is not None and not snapshot.finished
        else ended(snapshot),
        warnings=warnings,
    )
