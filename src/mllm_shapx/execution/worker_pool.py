"""The workers of a study on Ray: starts, watches and replaces them."""

import contextlib
import math
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mllm_shapx.errors import DatasetError, ModelError, ShapxError, first_of
from mllm_shapx.execution.actors import CoordinatorClient, WorkerActor, log_tail
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.kept import IdleWorkers
from mllm_shapx.execution.loading import LoadModel, model_key
from mllm_shapx.execution.messages import Study, StudyState
from mllm_shapx.execution.resources import WorkerResources
from mllm_shapx.models.base import ServerDiedError

TICK_S = 0.5
"""Seconds between two checks of the workers."""
START_FAILURES = 3
"""Workers in a row that may die before loading the model, when no worker has loaded it."""
LATER_START_FAILURES = 10
"""The same after a worker has loaded it: the model is not the cause."""
UNREACHABLE_S = 60.0
"""Seconds that a worker may be unreachable before it counts as lost."""
NO_PLACE_S = 60.0
"""Seconds without a placed worker on the cluster, after which the user gets a message."""
LOADING_S = 600.0
"""Seconds that loading the model may take, even with a shorter timeout for workers without progress."""
LOG_S = 10.0
"""Seconds that fetching a dead worker's log may take."""
CONNECT_S = 1.0
"""Seconds that a node may take to accept a connection."""


@dataclass(slots=True)
class _Member:
    """A worker's actor and the state of its process."""

    name: str
    actor: Any
    run: Any
    """Reference that becomes ready when the worker has no work left, or is dead."""
    place: Any
    node_id: str | None = None
    log: str | None = None
    """Its log on that node."""
    placed_at: float = 0.0
    unreachable_since: float | None = None
    """Time of losing the connection; since then the pool checks whether it is alive."""
    stuck: bool = False
    """Whether the driver killed it for lack of progress."""
    is_kept: bool = False
    """Whether it worked for an earlier study: if it died since, the model is not the cause."""


class WorkerPool:
    """The actors of the workers.

    Args:
        load: Loads the model in a worker's process.
        say: Shows a line to the user.
        idle: Workers of earlier studies; takes this study's workers at its end. None to end them.
    """

    def __init__(
        self,
        study: Study,
        load: LoadModel,
        coordinator: CoordinatorClient,
        *,
        resources: WorkerResources,
        say: Callable[[str], None],
        idle: IdleWorkers | None = None,
    ) -> None:
        self._study_ref = ray.put(study)
        self._idle = idle
        self._key = (model_key(study), resources, load)
        self._load = load
        self._coordinator = coordinator
        self._resources = resources
        self._stall_s = study.options.stall_s
        self._say = say
        self._here = ray.get_runtime_context().get_node_id()
        self._members: dict[str, _Member] = {}
        self._started = 0
        self._start_failures = 0
        self._loaded: set[str] = set()
        """Workers that have loaded the model, dead ones too."""
        self._placed_at = time.monotonic()

    def grow(self, wanted: int) -> None:
        """Start workers until there are `wanted`, or no free place is left."""
        cpus, gpus = self._resources.cpus, self._resources.gpus
        new = ray.remote(WorkerActor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        while len(self._members) < min(wanted, self._resources.workers):
            self._started += 1
            name = f"worker-{self._started}"
            kept = self._idle.take(self._key) if self._idle is not None else None
            actor = kept or new.remote(self._load, keeps_model=self._idle is not None)
            work = actor.run.remote(name, self._study_ref, self._coordinator.actor)
            place = actor.place.remote()
            self._members[name] = _Member(name, actor, work, place, is_kept=kept is not None)

    def look(self) -> None:
        """Wait for a tick; remove ended workers, and record the nodes of new ones.

        Raises:
            ShapxError: When the model or the dataset cannot be loaded, or workers die before they have.
        """
        runs = {member.run: member for member in self._members.values()}
        if not runs:
            time.sleep(TICK_S)
            return
        ready, _ = ray.wait(list(runs), num_returns=len(runs), timeout=TICK_S)
        for member in self._members.values():
            self._note_place(member)
        for reference in ready:
            member = runs[reference]
            if self._has_ended(member):
                del self._members[member.name]
                self._release(member)

    def _has_ended(self, member: _Member) -> bool:
        """Return whether a worker whose reference is ready has ended; report a loss."""
        try:
            ray.get(member.run)
        except ActorUnavailableError as error:
            if self._ask_again(member):
                return False
            self._lost(member, error)
        except ShapxError as error:
            # The model or the dataset cannot be loaded: other workers would fail too.
            raise self._naming_its_node(member, getattr(error, "cause", error)) from None
        except RayError as error:
            self._lost(member, error)
        else:
            if member.unreachable_since is not None:
                self._lost(member, RayError("its connection was lost"))
        return True

    def compare(self, state: StudyState) -> None:
        """Synchronize pool and coordinator: report ended workers, replace stuck ones."""
        self._loaded.update(state.workers)
        if self._loaded & set(self._members):
            self._start_failures = 0
        for name in state.workers:
            if name not in self._members:
                # The coordinator restarted, or the worker has just ended.
                self._report_lost(name, "it has ended", innocent=True)
        self._replace_stuck(state)

    def flush(self) -> list[Any]:
        """Ask the workers to send their unwritten answers; return references."""
        return [member.actor.flush.remote() for member in self._members.values()]

    def stop(self) -> None:
        """Let the workers send their answers and leave their units unfinished."""
        stops = [member.actor.stop.remote() for member in self._members.values()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=10.0)

    def wait(self, timeout_s: float) -> None:
        """Wait for the workers to end by themselves."""
        # A worker without a loaded model holds no unit, and may have no place on the cluster.
        runs = [member.run for member in self._members.values() if member.name in self._loaded]
        if runs:
            ray.wait(runs, num_returns=len(runs), timeout=timeout_s)

    def end(self) -> None:
        """End the workers' processes, except those kept for the next study."""
        for member in self._members.values():
            self._release(member)

    def _release(self, member: _Member) -> None:
        """End a worker's process, or keep it for the next study if it has done all its work."""
        if self._idle is not None and _has_done_all(member):
            self._idle.put(self._key, member.actor)
            return
        with contextlib.suppress(RayError):
            ray.kill(member.actor, no_restart=True)

    def _ask_again(self, member: _Member) -> bool:
        """Check an unreachable worker again; return False when that lasts too long, or its node is lost."""
        now = time.monotonic()
        member.unreachable_since = member.unreachable_since or now
        if now - member.unreachable_since > UNREACHABLE_S or self._is_node_lost(member):
            return False
        member.run = member.actor.place.remote()
        return True

    def _note_place(self, member: _Member) -> None:
        if member.node_id is None:
            with contextlib.suppress(RayError):
                member.node_id, member.log = ray.get(member.place, timeout=0)
                member.placed_at = time.monotonic()
        now = time.monotonic()
        if any(each.node_id for each in self._members.values()):
            self._placed_at = now
        elif now - self._placed_at > NO_PLACE_S:
            self._placed_at = math.inf
            self._say(
                f"no worker has a place on the cluster yet: each needs {self._resources.cpus:g} CPU(s) and "
                f"{self._resources.gpus:g} GPU(s), which others may hold, or a lost node had; waiting"
            )

    def _lost(self, member: _Member, error: RayError) -> None:
        """Report a lost worker to the coordinator.

        Only a crash is charged to a row. A lost node or connection is not, nor an error that the worker
        reported before it ended.
        """
        node_lost = "node has died" in str(error) or self._is_node_lost(member)
        has_died = isinstance(error, ActorDiedError) or isinstance(_cause(error), ServerDiedError)
        is_crash = has_died and not getattr(error, "preempted", False) and not node_lost
        detail = "its node was lost" if node_lost else _describe(error)
        if member.stuck:
            is_crash, detail = True, "it showed no progress and was replaced"
        if member.name not in self._loaded and not node_lost and not member.is_kept:
            self._start_failures += 1
            allowed = LATER_START_FAILURES if self._loaded else START_FAILURES
            if self._start_failures >= allowed:
                raise ShapxError(
                    f"{allowed} workers in a row died before they had loaded the model; "
                    f"the last one: {detail}"
                ) from error
        tail = () if node_lost else self._log_tail(member)
        self._say(f"{member.name} is gone: {detail}")
        self._report_lost(member.name, detail, innocent=not is_crash, tail=tail)

    def _report_lost(self, name: str, detail: str, *, innocent: bool, tail: tuple[str, ...] = ()) -> None:
        self._coordinator.tell(Coordinator.worker_lost, name, innocent=innocent, detail=detail, log_tail=tail)

    def _log_tail(self, member: _Member) -> tuple[str, ...]:
        """Return the worker's last log lines from its node."""
        if member.log is None or member.node_id is None:
            return ()
        if member.node_id == self._here:
            return log_tail(member.log)
        there = NodeAffinitySchedulingStrategy(node_id=member.node_id, soft=False)
        task = ray.remote(log_tail).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        try:
            lines: tuple[str, ...] = ray.get(task.remote(member.log), timeout=LOG_S)
        except RayError as error:
            return (f"(its log could not be fetched: {type(error).__name__})",)
        return lines

    def _naming_its_node(self, member: _Member, error: ShapxError) -> ShapxError:
        """Add the node's name to an error of a worker on another node, which may lack a path."""
        node = _node(member.node_id)
        if node is not None and member.node_id != self._here and isinstance(error, DatasetError | ModelError):
            name = node["NodeManagerHostname"]
            if (given := node.get("NodeName")) not in {None, "", node["NodeManagerAddress"]}:
                name = given
            where = f"on the node {name} ({node['NodeManagerAddress']})"
            error.args = (
                f"{where}: {error}. Every node needs the model and the dataset under the same path",
            )
        return error

    def _is_node_lost(self, member: _Member) -> bool:
        if member.node_id is None:
            return False
        node = _node(member.node_id)
        if node is None or not node["Alive"]:
            return True
        if member.unreachable_since is None:
            return False
        # Ray notices only after 15 s; the rows of the node's workers would wait that long.
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        try:
            socket.create_connection(address, timeout=CONNECT_S).close()
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
        return False

    def _replace_stuck(self, state: StudyState) -> None:
        placed_before = time.monotonic() - max(self._stall_s, LOADING_S)
        for name, member in sorted(self._members.items()):
            loads = member.node_id is not None and name not in self._loaded
            if member.stuck or not (name in state.stalled or (loads and member.placed_at < placed_before)):
                continue
            member.stuck = True
            self._say(f"{name} has shown no progress for {self._stall_s:g} s; it is replaced")
            ray.kill(member.actor, no_restart=True)


def _has_done_all(member: _Member) -> bool:
    """Return whether a worker ended because no work was left."""
    if member.unreachable_since is not None:
        return False
    with contextlib.suppress(RayError, ShapxError):
        ray.get(member.run, timeout=0)
        return True
    return False


def _node(node_id: str | None) -> dict[str, Any] | None:
    """Return Ray's entry of a node; None if Ray does not know it."""
    return next((node for node in ray.nodes() if node["NodeID"] == node_id), None)


def _cause(error: RayError) -> BaseException:
    """Return the exception that a worker raised; the error itself if Ray raised it."""
    return first_of(getattr(error, "cause", error))


def _describe(error: RayError) -> str:
    """Return in one line why a worker ended."""
    text = str(error).strip()
    if isinstance(error, RayTaskError):
        cause = _cause(error)
        return f"it ended with {type(cause).__name__}: {' '.join(str(cause).split())}"
    if found := re.search(r"Worker exit detail: (.+?)(?:\. Some common causes|$)", text, re.MULTILINE):
        return f"its process died: {found[1].strip()}"
    return " ".join(text.split()) or type(error).__name__
