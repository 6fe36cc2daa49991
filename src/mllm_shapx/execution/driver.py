"""The driver: starts the actors, watches them, replaces what dies, shows progress, and ends in good order."""

import contextlib
import json
import math
import pickle
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mllm_shapx.errors import ShapxError, StorageError, StudyError, first_of
from mllm_shapx.execution.actors import (
    NAMESPACE,
    PRIVATE_ENVIRONMENT,
    AggregatorActor,
    CoordinatorActor,
    WorkerActor,
)
from mllm_shapx.execution.cluster import WorkerResources, private_environment
from mllm_shapx.execution.messages import Snapshot, Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, ended
from mllm_shapx.execution.preparation import OpenOutput
from mllm_shapx.execution.progress import ProgressFeed
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.execution.workerlog import log_tail
from mllm_shapx.models.base import ServerDiedError
from mllm_shapx.reporting.progress import ProgressReporter

TICK_S = 0.5
"""Seconds between two looks at the actors."""
START_FAILURES = 3
"""Workers in a row that may die before they have loaded the model, when none ever has."""
LATER_START_FAILURES = 10
"""The same once a worker has loaded it: the model is not what is wrong."""
RESTART_S = 300.0
"""Seconds that the coordinator may take to come back: it reads the whole directory."""
DEAD_S = 10.0
"""Seconds after which Ray is believed that the coordinator does not come back."""
SILENCE_S = 60.0
"""Seconds that a worker may be out of reach before it is given up."""
NO_PLACE_S = 60.0
"""Seconds without any worker that has a place on the cluster, after which the user is told."""
LOADING_S = 600.0
"""Seconds that loading the model may take, however short the timeout for workers without progress is."""
LOG_S = 10.0
"""Seconds that fetching a dead worker's log may take."""
COALITIONS_WORTH_A_WORKER = 256
"""Coalitions for which loading the model once more pays, where rows are fewer than workers."""
CONNECT_S = 1.0
"""Seconds that a node may take to accept a connection."""
FINISH_S = 600.0
"""Seconds that the last writes and summaries may take."""
FINISH_TRIES = 5
"""Times that an aggregator that dies while it finishes is started again for it."""
FLUSH_S = 1.5
"""Seconds that workers get to hand in their answers at the first signal; `ray job stop` kills after 3."""


@dataclass(slots=True)
class _Hired:
    """A worker's actor and what is known of its process."""

    name: str
    actor: Any
    run: Any
    """Reference that becomes ready when the worker has no work left, or is dead."""
    place: Any
    node_id: str | None = None
    log: str | None = None
    """Its log on that node."""
    placed_at: float = 0.0
    silent_since: float | None = None
    """When its connection was lost; it is asked for a sign of life since."""
    stuck: bool = False
    """Whether the driver killed it for showing no progress."""


class Driver:
    """Runs one study on a Ray cluster that is connected already."""

    def __init__(
        self,
        study: Study,
        options: RunOptions,
        resources: WorkerResources,
        output: OpenOutput,
        reporter: ProgressReporter,
        *,
        request: StopRequest,
        folder: Path,
    ) -> None:
        self._study = study
        self._options = options
        self._resources = resources
        self._lock = output.lock
        self._reporter = reporter
        self._request = request
        self._feed = ProgressFeed(reporter)
        self._here = here = ray.get_runtime_context().get_node_id()
        on_this_node = {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=here, soft=False),
            # Ray does not hide GPUs from actors that ask for none.
            "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        }
        self._study_ref = ray.put(study)
        token = secrets.token_hex(4)
        # A file rather than Ray objects: an actor that is started again must find it, whatever was lost.
        shared = folder / "study.pickle"
        shared.write_bytes(pickle.dumps((study, dict(output.inspections), dict(output.specs))))
        private = folder / PRIVATE_ENVIRONMENT
        private.touch(0o600)
        private.write_text(json.dumps(private_environment()), encoding="utf-8")
        self._aggregator = (
            ray.remote(AggregatorActor)
            .options(**on_this_node, name=f"aggregator-{token}", namespace=NAMESPACE, max_restarts=-1)
            .remote(str(shared))
        )
        self._coordinator = (
            ray.remote(CoordinatorActor)
            .options(**on_this_node, max_restarts=-1, max_task_retries=0)
            .remote(str(shared), f"aggregator-{token}", options.stall_s)
        )
        self._workers: dict[str, _Hired] = {}
        self._hired = 0
        self._start_failures = 0
        self._met: set[str] = set()
        self._away_since: float | None = None
        self._placed_at = time.monotonic()
        self._stopping = False

    def run(self) -> StudyOutcome:
        """Explain everything that is left.

        Raises:
            ModelError: When the model cannot be loaded.
            StudyError: When it is not the model that the study began with, or its server does not answer.
            StorageError: When results cannot be written any more.
            OutputError: When another driver has taken the output directory.
        """
        started = time.monotonic()
        request = self._request
        try:
            self._watch(request)
            snapshot = self._wind_up(request)
            warnings = self._summaries(request)
        except StudyError:
            # What the other workers have answered counts: their model is the one that the study began with.
            self._stop_workers()
            self._tell(self._coordinator.finish.remote)
            raise
        finally:
            self._dismiss_all()
        interrupted = request.signal is not None and not snapshot.finished
        return StudyOutcome(
            experiment_set_id=self._study.experiment_set_id,
            output_uri=self._study.output_uri,
            done=dict(snapshot.done),
            failed=dict(snapshot.failed),
            total=dict(snapshot.total),
            model_calls=snapshot.model_calls,
            seconds=time.monotonic() - started,
            exit_code=request.exit_code if interrupted else ended(snapshot),
            warnings=warnings,
        )

    def _watch(self, request: StopRequest) -> None:
        """Keep the study going until it is finished, stopped or hopeless."""
        deadline: float | None = None
        while True:
            self._lock.check()
            self._look_after_workers()
            snapshot = self._look()
            if snapshot is not None:
                if snapshot.finished or snapshot.fatal is not None:
                    return
                self._met.update(snapshot.workers)
                if self._met & set(self._workers):
                    self._start_failures = 0
                self._bury(snapshot)
                self._replace_stuck(snapshot)
                if self._stopping and not snapshot.draining:
                    # It was started again since it was told.
                    self._tell(self._coordinator.drain.remote)
                self._stopping = self._stopping or snapshot.draining
                if deadline is None and not self._stopping:
                    self._hire(snapshot)
                if self._stopping and not snapshot.busy_workers:
                    return
            if request.signal is not None and deadline is None:
                deadline = time.monotonic() + request.grace_s(self._options.grace_s)
                self._drain(request)
            if deadline is not None and time.monotonic() > deadline:
                self._stop_workers()
                return

    # --- workers

    def _hire(self, snapshot: Snapshot) -> None:
        """Start as many workers as there are places and work."""
        wanted = min(self._resources.workers, max(snapshot.unfinished_units, _worth_helping(snapshot)))
        while len(self._workers) < wanted:
            self._hired += 1
            name = f"worker-{self._hired}"
            actor = (
                ray.remote(WorkerActor)
                .options(
                    num_cpus=self._resources.cpus,
                    num_gpus=self._resources.gpus,
                    max_restarts=0,
                    scheduling_strategy="SPREAD",
                )
                .remote(name, self._study_ref, self._coordinator)
            )
            self._workers[name] = _Hired(name, actor, actor.run.remote(), actor.place.remote())

    def _look_after_workers(self) -> None:
        """Notice workers that have ended, and where new ones are."""
        runs = {worker.run: worker for worker in self._workers.values()}
        if not runs:
            time.sleep(TICK_S)
            return
        ready, _ = ray.wait(list(runs), num_returns=len(runs), timeout=TICK_S)
        for worker in self._workers.values():
            self._note_place(worker)
        for reference in ready:
            worker = runs[reference]
            try:
                ray.get(reference)
            except ActorUnavailableError as error:
                if self._ask_again(worker):
                    continue
                self._lost(worker, error)
            except ShapxError as error:
                # The model or the dataset cannot be loaded: no other worker would fare better.
                raise getattr(error, "cause", error) from None
            except RayError as error:
                self._lost(worker, error)
            else:
                if worker.silent_since is not None:
                    self._lost(worker, RayError("its connection was lost"))
            ray.kill(worker.actor, no_restart=True)
            del self._workers[worker.name]

    def _ask_again(self, worker: _Hired) -> bool:
        """Ask a worker that cannot be reached for a sign of life: only the answer says what became of it.

        Returns:
            False when it has been silent for too long, or its node is gone.
        """
        now = time.monotonic()
        worker.silent_since = worker.silent_since or now
        if now - worker.silent_since > SILENCE_S or self._is_node_gone(worker):
            return False
        worker.run = worker.actor.place.remote()
        return True

    def _note_place(self, worker: _Hired) -> None:
        if worker.node_id is None:
            with contextlib.suppress(RayError):
                worker.node_id, worker.log = ray.get(worker.place, timeout=0)
                worker.placed_at = time.monotonic()
        now = time.monotonic()
        if any(hired.node_id for hired in self._workers.values()):
            self._placed_at = now
        elif now - self._placed_at > NO_PLACE_S:
            self._placed_at = math.inf
            self._reporter.message(
                f"no worker has a place on the cluster yet: each needs {self._resources.cpus:g} CPU(s) and "
                f"{self._resources.gpus:g} GPU(s), which others may hold, or a lost node had; waiting"
            )

    def _lost(self, worker: _Hired, error: RayError) -> None:
        """Tell the coordinator of a worker that is gone.

        A row is to blame for a crash alone: not for a lost node or connection, nor for an error that the
        worker told of before it ended.
        """
        node_gone = "node has died" in str(error) or self._is_node_gone(worker)
        has_died = isinstance(error, ActorDiedError) or isinstance(_cause(error), ServerDiedError)
        is_crash = has_died and not _is_preempted(error) and not node_gone
        detail = _describe(error, node_gone=node_gone)
        if worker.stuck:
            detail = "it showed no progress and was replaced"
            is_crash = True
        if worker.name not in self._met and not node_gone:
            self._start_failures += 1
            allowed = LATER_START_FAILURES if self._met else START_FAILURES
            if self._start_failures >= allowed:
                raise ShapxError(
                    f"{allowed} workers in a row died before they had loaded the model; "
                    f"the last one: {detail}"
                ) from error
        tail = () if node_gone else self._log_tail(worker)
        self._reporter.message(f"{worker.name} is gone: {detail}")
        self._tell(lambda: self._coordinator.worker_lost.remote(worker.name, not is_crash, detail, tail))

    def _log_tail(self, worker: _Hired) -> tuple[str, ...]:
        """Return the worker's last log lines, from the node where it ran."""
        if worker.log is None or worker.node_id is None:
            return ()
        if worker.node_id == self._here:
            return log_tail(worker.log)
        there = NodeAffinitySchedulingStrategy(node_id=worker.node_id, soft=False)
        task = ray.remote(log_tail).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        try:
            lines: tuple[str, ...] = ray.get(task.remote(worker.log), timeout=LOG_S)
        except RayError as error:
            return (f"(its log could not be fetched: {type(error).__name__})",)
        return lines

    def _is_node_gone(self, worker: _Hired) -> bool:
        if worker.node_id is None:
            return False
        node = next((node for node in ray.nodes() if node["NodeID"] == worker.node_id), None)
        if node is None or not node["Alive"]:
            return True
        # Ray takes 15 s to notice, in which the rows of the node's workers would wait.
        return worker.silent_since is not None and _is_refused(
            node["NodeManagerAddress"], node["NodeManagerPort"]
        )

    def _bury(self, snapshot: Snapshot) -> None:
        """Tell the coordinator of workers that it takes for living: it was started again, or they ended."""
        for name in snapshot.workers:
            if name not in self._workers:
                self._tell(partial(self._coordinator.worker_lost.remote, name, True, "it has ended", ()))

    def _replace_stuck(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        loading_too_long = {
            worker.name
            for worker in self._workers.values()
            if worker.node_id is not None
            and worker.name not in self._met
            and now - worker.placed_at > max(self._options.stall_s, LOADING_S)
        }
        for name in sorted({*snapshot.stalled, *loading_too_long}):
            worker = self._workers.get(name)
            if worker is not None and not worker.stuck:
                worker.stuck = True
                self._reporter.message(
                    f"{name} has shown no progress for {self._options.stall_s:g} s; it is replaced"
                )
                ray.kill(worker.actor, no_restart=True)

    # --- coordinator

    def _look(self) -> Snapshot | None:
        """Return how the study stands and show it; None while the coordinator is being restarted."""
        try:
            snapshot: Snapshot = ray.get(self._coordinator.snapshot.remote(), timeout=60.0)
        except (RayActorError, GetTimeoutError) as error:
            self._miss(error)
            time.sleep(TICK_S)
            return None
        if self._away_since is not None:
            self._away_since = None
            self._reporter.message("the coordinator is back")
        self._feed.show(snapshot)
        return snapshot

    def _miss(self, error: RayError) -> None:
        """Note that the coordinator does not answer; give up when it does not come back."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            self._reporter.message("the coordinator is gone; it is restarted and reads the directory again")
        away = now - self._away_since
        if away > RESTART_S or (isinstance(error, ActorDiedError) and away > DEAD_S):
            raise ShapxError(
                f"the coordinator could not be restarted: {error}. What was written is valid; go on with "
                "--resume"
            ) from error

    def _tell(self, call: Callable[[], Any]) -> None:
        """Make a call to the coordinator, again while it is being restarted."""
        while True:
            try:
                ray.get(call(), timeout=60.0)
            except (RayActorError, GetTimeoutError) as error:
                self._miss(error)
                time.sleep(TICK_S)
            else:
                return

    # --- the end

    def _drain(self, request: StopRequest) -> None:
        """Hand out nothing more and have what is at hand written: `ray job stop` leaves 3 s for it."""
        self._reporter.message(request.announcement(self._options.grace_s))
        self._stopping = True
        calls = [self._coordinator.drain.remote()]
        calls += [worker.actor.flush.remote() for worker in self._workers.values()]
        ray.wait(calls, num_returns=len(calls), timeout=FLUSH_S)

    def _stop_workers(self) -> None:
        stops = [worker.actor.stop.remote() for worker in self._workers.values()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=10.0)

    def _wind_up(self, request: StopRequest) -> Snapshot:
        """Let the workers end, write what is left, and return the last snapshot."""
        # A worker that has not reported yet may have no place on the cluster, and holds nothing.
        runs = [worker.run for worker in self._workers.values() if worker.name in self._met]
        if runs:
            ray.wait(runs, num_returns=len(runs), timeout=10.0 if request.signal is None else FLUSH_S)
        self._tell(self._coordinator.finish.remote)
        snapshot = self._look()
        if snapshot is None:
            raise ShapxError("the coordinator did not come back at the end; resume with --resume")
        if snapshot.fatal is not None:
            raise StorageError(snapshot.fatal)
        return snapshot

    def _summaries(self, request: StopRequest) -> tuple[str, ...]:
        timeout = FINISH_S if request.signal is None else self._options.grace_s
        try:
            # It may be called twice: what was logged is not logged again.
            finish = self._aggregator.finish.options(max_task_retries=FINISH_TRIES).remote()
            warnings: tuple[str, ...] = ray.get(finish, timeout=timeout)
        except RayActorError:
            from mllm_shapx.execution.aggregator import write_summary
            from mllm_shapx.records.storage import open_storage

            storage = open_storage(self._study.output_uri)
            for run in self._study.runs:
                write_summary(storage, run.name, self._study.rows)
            return ("the aggregator died: W&B may lack the last samples; the summaries are complete",)
        except GetTimeoutError:
            return ("the summaries could not be written in time; --resume writes them",)
        return warnings

    def _dismiss_all(self) -> None:
        for worker in self._workers.values():
            with contextlib.suppress(RayError):
                ray.kill(worker.actor, no_restart=True)
        for actor in (self._coordinator, self._aggregator):
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)


def _worth_helping(snapshot: Snapshot) -> int:
    """Return how many workers the coalitions that are left are worth: a heavy row is spread over several."""
    if not snapshot.unfinished_units:
        return 0
    left = snapshot.coalitions_total - snapshot.coalitions_done
    return int(min(left / COALITIONS_WORTH_A_WORKER, sys.maxsize))


def _is_refused(host: str, port: int) -> bool:
    """Return whether a machine says that nobody listens at a port; False when it says nothing."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _is_preempted(error: RayError) -> bool:
    return bool(getattr(error, "preempted", False))


def _cause(error: RayError) -> BaseException:
    """Return what a worker raised; the error itself where Ray raised it."""
    return first_of(getattr(error, "cause", error))


def _describe(error: RayError, *, node_gone: bool) -> str:
    """Return why a worker is gone, in a line."""
    if node_gone:
        return "its node was lost"
    text = str(error).strip()
    if isinstance(error, RayTaskError):
        cause = _cause(error)
        return f"it ended with {type(cause).__name__}: {' '.join(str(cause).split())}"
    if found := re.search(r"Worker exit detail: (.+?)(?:\. Some common causes|$)", text, re.MULTILINE):
        return f"its process died: {found[1].strip()}"
    return " ".join(text.split()) or type(error).__name__
