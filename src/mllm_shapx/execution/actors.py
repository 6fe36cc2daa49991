"""The actors: coordinator, aggregator and workers, each in its own process."""

import asyncio
import logging
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Self

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError

from mllm_shapx.errors import ShapxError
from mllm_shapx.execution.aggregator import Aggregator
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.loading import LoadModel, ModelShelf
from mllm_shapx.execution.messages import Study, StudyState
from mllm_shapx.execution.worker import Worker
from mllm_shapx.execution.writer import OnSample
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunInspection

logger = logging.getLogger(__name__)

NAMESPACE = "mllm_shapx"
"""Ray namespace of the named actors."""

COORDINATOR_PATIENCE_S = 180.0
"""Seconds that a worker waits for a restarting coordinator."""
RESTART_S = 300.0
"""Seconds that a restart of the coordinator may take: it reads the whole directory."""
DEAD_S = 10.0
"""Seconds until Ray's report of the coordinator's death counts as final."""
CALL_S = 60.0
"""Seconds that a call of the driver may take."""
RETRY_S = 0.5
"""Seconds before the next attempt of a call."""
LOG_LINES = 20
"""Lines of a worker's log in a failure record."""
_MOST_LOG_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Shared:
    """What the driver tells the actors on its node, in a file that only this user can read."""

    study: Study
    inspections: dict[str, RunInspection]
    specs: dict[str, dict[str, Any]]
    secrets: dict[str, str] = field(repr=False)
    """The driver's environment variables that hold secrets, for the trackers."""

    @classmethod
    def read(cls, path: str) -> Self:
        """Begin an actor without a model: read the driver's file for it."""
        _set_up_logging()
        # The GPUs are for the workers: Ray does not hide them from actors that request none. A separate
        # environment for the actor would do the same, but needs a new process.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        shared: Self = pickle.loads(Path(path).read_bytes())  # noqa: S301 -- the driver's own file
        return shared


class CoordinatorActor(Coordinator):
    """A `Coordinator` in its own process. After a restart it reads the directory again."""

    def __init__(self, shared: str, aggregator_name: str) -> None:
        found = Shared.read(shared)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        rows = frozenset(found.study.rows)
        super().__init__(
            found.study,
            None if restarted else found.inspections,
            _log_of(aggregator_name),
            sum(len(each.failed & rows) for each in found.inspections.values()),
        )


class AggregatorActor(Aggregator):
    """An `Aggregator` in its own process. After a restart it reads the logged samples from W&B's logs."""

    def __init__(self, shared: str) -> None:
        found = Shared.read(shared)
        for name, value in found.secrets.items():
            os.environ.setdefault(name, value)
        super().__init__(found.study, found.specs, found.inspections)


class WorkerActor:
    """A process for one worker; with `keeps_model`, for those of several studies with the same model."""

    def __init__(self, load: LoadModel, *, keeps_model: bool) -> None:
        _set_up_logging()
        self._load = load
        self._shelf = ModelShelf(load) if keeps_model else None
        self._worker: Worker | None = None

    async def run(self, worker: str, study: Study, coordinator: Any) -> None:
        """See `Worker.run`."""
        self._worker = Worker(worker, study, ActorDesk(coordinator), self._load, shelf=self._shelf)
        await self._worker.run()

    async def flush(self) -> None:
        """See `Worker.flush`."""
        if self._worker is not None:
            await self._worker.flush()

    async def stop(self) -> None:
        """See `Worker.stop`."""
        if self._worker is not None:
            await self._worker.stop()

    async def close(self) -> None:
        """Release the kept model; called between two studies."""
        if self._shelf is not None:
            await asyncio.to_thread(self._shelf.close)

    async def place(self) -> tuple[str, str | None]:
        """Return the node's id, and the path of this process's log on it."""
        return ray.get_runtime_context().get_node_id(), own_log()


class ActorDesk:
    """The connection to the coordinator's actor. Calls wait while the actor restarts."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    async def call[**P, R](
        self, method: Callable[Concatenate[Coordinator, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See `Desk.call`."""
        deadline = time.monotonic() + COORDINATOR_PATIENCE_S
        while True:
            try:
                reply: R = await getattr(self._coordinator, method.__name__).remote(*args, **kwargs)
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return reply


class CoordinatorClient:
    """The driver's connection to the coordinator's actor; `say` shows a line to the user.

    Calls raise a `ShapxError` if the coordinator cannot be restarted.
    """

    def __init__(self, actor: Any, say: Callable[[str], None]) -> None:
        self.actor = actor
        self._say = say
        self._away_since: float | None = None

    def state(self) -> StudyState | None:
        """Return the state of the study; None while the coordinator restarts."""
        try:
            state: StudyState = ray.get(self.actor.state.remote(), timeout=CALL_S)
        except (RayActorError, GetTimeoutError) as error:
            self._missed(error)
            return None
        if self._away_since is not None:
            self._away_since = None
            self._say("the coordinator is back")
        return state

    def tell[**P](
        self, method: Callable[Concatenate[Coordinator, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Call a method of the coordinator; repeat the call while it restarts."""
        while True:
            try:
                ray.get(getattr(self.actor, method.__name__).remote(*args, **kwargs), timeout=CALL_S)
            except (RayActorError, GetTimeoutError) as error:
                self._missed(error)
            else:
                return

    def _missed(self, error: RayError) -> None:
        """Pause while the coordinator does not answer; raise an error if its restart fails."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            self._say("the coordinator is gone; it is restarted and reads the directory again")
        away = now - self._away_since
        if away > RESTART_S or (isinstance(error, ActorDiedError) and away > DEAD_S):
            raise ShapxError(
                f"the coordinator could not be restarted: {error}. What was written is valid; go on with "
                "--resume"
            ) from error
        time.sleep(RETRY_S)


def own_log() -> str | None:
    """Return the path of this process's standard error; None if it is not a file."""
    try:
        path = Path("/proc/self/fd/2").readlink()
    except OSError:
        return None
    return str(path) if path.is_file() else None


def log_tail(path: str) -> tuple[str, ...]:
    """Return the last lines of a log; empty if it is not on this machine."""
    try:
        with Path(path).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _MOST_LOG_BYTES))
            return tuple(file.read().decode(errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ()


def _log_of(aggregator_name: str) -> OnSample | None:
    """Return a callback that sends samples to the aggregator; None if it is dead: the files suffice."""
    try:
        # By name: a restarted actor may have lost a handle, which is a Ray reference.
        aggregator = ray.get_actor(aggregator_name, namespace=NAMESPACE)
    except ValueError:
        logger.warning("the aggregator is gone; summaries are made from the files at the end")
        return None

    def log(sample: SampleResult) -> None:
        aggregator.log.remote(sample)

    return log


def _set_up_logging() -> None:
    level = os.environ.get("LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
