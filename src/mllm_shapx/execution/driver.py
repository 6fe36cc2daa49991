"""The driver: runs a study on a connected Ray cluster."""

import contextlib
import pickle
import secrets
import sys
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mllm_shapx.errors import ShapxError
from mllm_shapx.execution.actors import (
    NAMESPACE,
    AggregatorActor,
    CoordinatorActor,
    CoordinatorClient,
    Shared,
)
from mllm_shapx.execution.aggregator import write_summaries
from mllm_shapx.execution.autoscaling import NodeRequest
from mllm_shapx.execution.cluster import private_environment
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.kept import IdleWorkers
from mllm_shapx.execution.lifecycle import Call
from mllm_shapx.execution.loading import LoadModel
from mllm_shapx.execution.messages import Study, StudyState
from mllm_shapx.execution.preparation import OpenOutput
from mllm_shapx.execution.resources import WorkerResources
from mllm_shapx.execution.worker_pool import WorkerPool
from mllm_shapx.records.storage import open_storage

COALITIONS_WORTH_A_WORKER = 256
"""Coalitions that justify one more load of the model, when there are fewer rows than workers."""
END_S = 10.0
"""Seconds that workers may take to end when no work is left."""
FINISH_S = 600.0
"""Seconds that the last writes and summaries may take."""
FINISH_TRIES = 5
"""Retries of the aggregator's last step, if the aggregator dies during it."""
FLUSH_S = 1.5
"""Seconds that workers have to send their answers after the first signal; `ray job stop` kills after 3."""


class Driver:
    """Starts the actors of one study and watches them. A `Crew`.

    Args:
        folder: A folder that is open only to this user.
        load: Loads the model in a worker's process.
        nodes: Requests the nodes that workers need; None on a cluster without autoscaling.
        idle: Keeps the workers and their model for the next study; None to end them.
    """

    def __init__(
        self,
        study: Study,
        output: OpenOutput,
        call: Call,
        resources: WorkerResources,
        *,
        folder: Path,
        load: LoadModel,
        nodes: NodeRequest | None = None,
        idle: IdleWorkers | None = None,
    ) -> None:
        self._study = study
        self._nodes = nodes
        self._call = call
        node_id = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        on_this_node = {"num_cpus": 0, "scheduling_strategy": here}
        token = secrets.token_hex(4)
        # A file, not Ray objects: a restarted actor must find it, even after the loss of a node.
        shared = folder / "study.pickle"
        shared.touch(0o600)
        content = Shared(study, dict(output.inspections), dict(output.specs), private_environment())
        shared.write_bytes(pickle.dumps(content))
        self._aggregator = (
            ray.remote(AggregatorActor)
            .options(**on_this_node, name=f"aggregator-{token}", namespace=NAMESPACE, max_restarts=-1)
            .remote(str(shared))
        )
        coordinator = (
            ray.remote(CoordinatorActor)
            .options(**on_this_node, max_restarts=-1, max_task_retries=0)
            .remote(str(shared), f"aggregator-{token}")
        )
        self._coordinator = CoordinatorClient(coordinator, call.reporter.message)
        self._pool = WorkerPool(
            study, load, self._coordinator, resources=resources, say=call.reporter.message, idle=idle
        )
        self._draining = False
        # At once: workers load the model while the coordinator's process starts.
        self._grow(len(study.units_left(output.inspections)))

    def step(self) -> StudyState | None:
        """See `Crew.step`."""
        self._pool.look()
        state = self._coordinator.state()
        if state is None or state.finished or state.fatal is not None:
            return state
        self._pool.compare(state)
        if self._draining and not state.draining:
            # The coordinator restarted after the call of `drain`.
            self._coordinator.tell(Coordinator.drain)
        self._draining = self._draining or state.draining
        if not self._draining:
            self._grow(max(state.unfinished_units, _worth_helping(state)))
        return state

    def drain(self) -> None:
        """See `Crew.drain`. `ray job stop` kills after 3 s."""
        self._draining = True
        calls = [self._coordinator.actor.drain.remote(), *self._pool.flush()]
        ray.wait(calls, num_returns=len(calls), timeout=FLUSH_S)

    def stop(self) -> None:
        """See `Crew.stop`."""
        self._pool.stop()

    def finish(self) -> StudyState:
        """See `Crew.finish`."""
        self._pool.wait(FLUSH_S if self._call.is_stopped else END_S)
        self._coordinator.tell(Coordinator.finish)
        state = self._coordinator.state()
        if state is None:
            raise ShapxError("the coordinator did not come back at the end; resume with --resume")
        return state

    def save(self) -> StudyState | None:
        """See `Crew.save`."""
        self._pool.stop()
        self._coordinator.tell(Coordinator.finish)
        return self._coordinator.state()

    def summarize(self) -> tuple[str, ...]:
        """See `Crew.summarize`."""
        timeout = self._study.options.grace_s if self._call.is_stopped else FINISH_S
        try:
            # Safe to repeat: logged samples are not logged again.
            finish = self._aggregator.finish.options(max_task_retries=FINISH_TRIES).remote()
            warnings: tuple[str, ...] = ray.get(finish, timeout=timeout)
        except RayActorError:
            write_summaries(open_storage(self._study.output_uri), self._study)
            return ("the aggregator died: W&B may lack the last samples; the summaries are complete",)
        except GetTimeoutError:
            return ("the summaries could not be written in time; --resume writes them",)
        return warnings

    def close(self) -> None:
        """See `Crew.close`."""
        self._pool.end()
        for actor in (self._coordinator.actor, self._aggregator):
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)

    def _grow(self, wanted: int) -> None:
        if self._nodes is not None:
            self._nodes.ask(wanted)
        self._pool.grow(wanted)


def _worth_helping(state: StudyState) -> int:
    """Return how many workers the remaining coalitions justify: several may answer one heavy row."""
    if not state.unfinished_units:
        return 0
    left = state.coalitions_total - state.coalitions_done
    return int(min(left / COALITIONS_WORTH_A_WORKER, sys.maxsize))
