"""Requests a study's nodes from a cluster that starts nodes on demand, and withdraws the request."""

import json
import logging

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get

from mllm_shapx.execution.resources import WorkerResources

logger = logging.getLogger(__name__)


def is_autoscaling() -> bool:
    """Return whether the joined cluster has an autoscaler that starts nodes.

    Ray runs its monitor on every cluster. Without autoscaling, each node is its own type, named after the
    node.
    """
    try:
        types = _node_types()
    except Exception:
        logger.info("Ray does not say whether the cluster starts nodes on demand", exc_info=True)
        return False
    return any(kind != f"node_{node}" for node, kind in types.items())


class NodeRequest:
    """The requested nodes. Ray keeps one request for the whole cluster: another study's replaces it."""

    def __init__(self, resources: WorkerResources) -> None:
        self._resources = resources
        self._asked = 0

    def ask(self, workers: int) -> None:
        """Request nodes for so many workers, at most the call's; never fewer than before."""
        workers = min(workers, self._resources.workers)
        if workers <= self._asked:
            return
        bundle = {"CPU": self._resources.cpus, "GPU": self._resources.gpus}
        # If it is refused: workers that wait for a place are a demand too.
        _request([{name: value for name, value in bundle.items() if value}] * workers)
        self._asked = workers

    def clear(self) -> None:
        """Withdraw the request, so that idle nodes can be stopped."""
        if self._asked:
            self._asked = 0
            _request([])


def _request(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources  # a slow import that most clusters do not need

    try:
        request_resources(bundles=bundles)
    except (RayError, RuntimeError, OSError) as error:
        logger.warning("the autoscaler refused a request for %d worker(s): %s", len(bundles), error)


def _node_types() -> dict[str, str]:
    """Return node -> its type according to the autoscaler; empty before its first check."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2():
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return {node.node_id: node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes]}
    status_v1 = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return dict((status_v1.get("autoscaler_report") or {}).get("node_type_mapping") or {})
