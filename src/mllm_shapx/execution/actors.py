"""The actors: thin shells that put coordinator, aggregator and workers into processes of their own."""

import asyncio
import json
import logging
import os
import pickle
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from mllm_shapx.execution.aggregator import Aggregator
from mllm_shapx.execution.coordinator import Coordinator, OnSample
from mllm_shapx.execution.messages import (
    Answers,
    Beat,
    LeaseReply,
    Snapshot,
    Study,
    UnitFailure,
    WorkerInfo,
)
from mllm_shapx.execution.sharing import Offer, OfferReply
from mllm_shapx.execution.worker import Worker
from mllm_shapx.execution.workerlog import own_log
from mllm_shapx.models.base import Answer
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection

logger = logging.getLogger(__name__)

NAMESPACE = "mllm_shapx"
"""Ray namespace of the actors that are looked up by name."""

PRIVATE_ENVIRONMENT = "environment.json"
"""File with the driver's secrets, beside the study's: only the user reads it."""

COORDINATOR_PATIENCE_S = 180.0
"""How long a worker waits for a coordinator that is being restarted."""


class CoordinatorActor:
    """Holds the `Coordinator`. After a restart it finds out from the directory what is done."""

    def __init__(self, shared: str, aggregator_name: str, stall_s: float) -> None:
        _set_up_logging()
        study, inspections, _ = _read(shared)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        on_sample = _log_of(aggregator_name)
        rows = frozenset(study.rows)
        self._coordinator = Coordinator(
            study,
            None if restarted else inspections,
            on_sample,
            stall_s,
            sum(len(found.failed & rows) for found in inspections.values()),
        )

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def lease(self, me: WorkerInfo, held: tuple[str, ...]) -> LeaseReply:
        """See `Coordinator.lease`."""
        return self._coordinator.lease(me, held)

    def report(self, me: WorkerInfo, unit_id: str, sample: SampleResult, answers: Answers) -> None:
        """See `Coordinator.report`."""
        self._coordinator.report(me, unit_id, sample, answers)

    def flush(self, me: WorkerInfo, unit_id: str, answers: Answers) -> None:
        """See `Coordinator.flush`."""
        self._coordinator.flush(me, unit_id, answers)

    def fail(self, me: WorkerInfo, failure: UnitFailure) -> None:
        """See `Coordinator.fail`."""
        self._coordinator.fail(me, failure)

    def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """See `Coordinator.beat`."""
        return self._coordinator.beat(me, beat)

    def exchange(self, me: WorkerInfo, offer: Offer) -> OfferReply:
        """See `Coordinator.exchange`."""
        return self._coordinator.exchange(me, offer)

    def helped(self, me: WorkerInfo, task_id: int, answers: dict[int, Answer]) -> None:
        """See `Coordinator.helped`."""
        self._coordinator.helped(me, task_id, answers)

    def worker_lost(self, worker: str, innocent: bool, detail: str, log_tail: tuple[str, ...]) -> None:
        """See `Coordinator.worker_lost`."""
        self._coordinator.worker_lost(worker, innocent=innocent, detail=detail, log_tail=log_tail)

    def drain(self) -> None:
        """See `Coordinator.drain`."""
        self._coordinator.drain()

    def snapshot(self) -> Snapshot:
        """See `Coordinator.snapshot`."""
        return self._coordinator.snapshot()

    def finish(self) -> None:
        """See `Coordinator.finish`."""
        self._coordinator.finish()


class AggregatorActor:
    """Holds the `Aggregator`. After a restart it finds out from W&B's logs what is logged."""

    def __init__(self, shared: str) -> None:
        _set_up_logging()
        study, inspections, specs = _read(shared)
        private = Path(shared).with_name(PRIVATE_ENVIRONMENT)
        for name, value in json.loads(private.read_text(encoding="utf-8")).items():
            os.environ.setdefault(name, value)
        self._aggregator = Aggregator(study, specs, inspections)

    def log(self, sample: SampleResult) -> None:
        """See `Aggregator.log`."""
        self._aggregator.log(sample)

    def finish(self) -> tuple[str, ...]:
        """See `Aggregator.finish`."""
        return self._aggregator.finish()


class WorkerActor:
    """Holds a `Worker`."""

    def __init__(self, worker: str, study: Study, coordinator: Any) -> None:
        _set_up_logging()
        self._worker = Worker(worker, study, ActorDesk(coordinator))

    async def place(self) -> tuple[str, str | None]:
        """Return the id of the node, and the path there of this process's log."""
        return ray.get_runtime_context().get_node_id(), own_log()

    async def run(self) -> None:
        """See `Worker.run`."""
        await self._worker.run()

    async def flush(self) -> None:
        """See `Worker.flush`."""
        await self._worker.flush()

    async def stop(self) -> None:
        """See `Worker.stop`."""
        await self._worker.stop()


class ActorDesk:
    """The coordinator's actor as a worker sees it; waits for it while it is being restarted."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    async def lease(self, me: WorkerInfo, held: tuple[str, ...]) -> LeaseReply:
        """Ask for a unit."""
        reply: LeaseReply = await self._patiently(lambda: self._coordinator.lease.remote(me, held))
        return reply

    async def report(self, me: WorkerInfo, unit_id: str, sample: SampleResult, answers: Answers) -> None:
        """Hand in a sample."""
        await self._patiently(lambda: self._coordinator.report.remote(me, unit_id, sample, answers))

    async def flush(self, me: WorkerInfo, unit_id: str, answers: Answers) -> None:
        """Hand in answers."""
        await self._patiently(lambda: self._coordinator.flush.remote(me, unit_id, answers))

    async def fail(self, me: WorkerInfo, failure: UnitFailure) -> None:
        """Hand in a failure."""
        await self._patiently(lambda: self._coordinator.fail.remote(me, failure))

    async def beat(self, me: WorkerInfo, beat: Beat) -> LeaseReply:
        """Give a sign of life."""
        reply: LeaseReply = await self._patiently(lambda: self._coordinator.beat.remote(me, beat))
        return reply

    async def exchange(self, me: WorkerInfo, offer: Offer) -> OfferReply:
        """Offer coalitions to idle workers."""
        reply: OfferReply = await self._patiently(lambda: self._coordinator.exchange.remote(me, offer))
        return reply

    async def helped(self, me: WorkerInfo, task_id: int, answers: dict[int, Answer]) -> None:
        """Hand in answers to another worker's coalitions."""
        await self._patiently(lambda: self._coordinator.helped.remote(me, task_id, answers))

    @staticmethod
    async def _patiently(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        deadline = time.monotonic() + COORDINATOR_PATIENCE_S
        while True:
            try:
                return await call()
            except (ActorUnavailableError, ActorDiedError, RayActorError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)


def _log_of(aggregator_name: str) -> OnSample | None:
    """Return what hands samples to the aggregator; None when it is dead: the files are what counts."""
    try:
        # By name: a handle would be a reference, and an actor that is started again may lack it.
        aggregator = ray.get_actor(aggregator_name, namespace=NAMESPACE)
    except ValueError:
        logger.warning("the aggregator is gone; summaries are made from the files at the end")
        return None

    def log(sample: SampleResult) -> None:
        aggregator.log.remote(sample)

    return log


def _read(path: str) -> tuple[Study, dict[str, RunInspection], dict[str, dict[str, Any]]]:
    """Read what the driver wrote for the actors on its node: study, inspections and specs."""
    study, inspections, specs = pickle.loads(Path(path).read_bytes())  # noqa: S301 -- the driver's own file
    return study, inspections, specs


def _set_up_logging() -> None:
    level = os.environ.get("LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
