"""Decides the number of workers, and the CPUs and GPUs of each."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.errors import ResourceError
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions

_GPU_DEVICES = (
    "dev/nvidia[0-9]*",
    "proc/driver/nvidia/gpus/*",
    "dev/kfd",
    "dev/dxg",
    "dev/dri/renderD*",
)
"""Device files of GPUs: NVIDIA, AMD, WSL and Intel."""


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """The number of workers, and the CPUs and GPUs of each."""

    workers: int
    gpus: float
    """GPUs of one worker; 0 for a worker on the CPU."""
    cpus: float
    """CPUs of one worker; Ray sets the worker's OMP_NUM_THREADS to it."""


def check_gpus(options: RunOptions) -> None:
    """Refuse --num-gpus on a machine without GPUs before Ray starts; Ray notices it late."""
    if not options.gpus_asked or "RAY_OVERRIDE_RESOURCES" in os.environ or sys.platform != "linux":
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in {"", "-1", "NoDevFiles"}
    if hidden or not any(found for pattern in _GPU_DEVICES for found in Path("/").glob(pattern)):
        raise ResourceError(_too_many_gpus(options.gpus_asked, "this machine has none"))


def _too_many_gpus(asked: float, have: str) -> str:
    return (
        f"--num-gpus {asked:g} asks for more GPUs than there are: {have}. "
        "Lower it, join a larger cluster with --address, or use --num-workers for workers on the CPU"
    )


def plan_resources(study: Study, *, grows: bool = False) -> WorkerResources:
    """Return the workers to start, from the options and the resources of the cluster.

    `--num-gpus all` uses every GPU of the cluster; without --num-gpus it is the same, unless the workers work
    on the CPU. A cluster that `grows` may get requests beyond its size.

    Raises:
        ResourceError: When the cluster lacks the requested resources.
    """
    import ray

    options, run = study.options, study.runs[0]
    device, server = run.device, run.connector_kwargs.server
    server_gpus = None if server is None else server.gpus or None
    if run.connector == CONNECTOR:
        # A worker that starts its own server on GPUs takes any GPU.
        device = "cpu" if server_gpus is None else None
    have: dict[str, Any] = ray.cluster_resources()
    gpus = float(have.get("GPU", 0.0))
    cpus = [float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"]]
    wants_gpus = options.gpus_asked
    if wants_gpus is None:
        wants_gpus = gpus if options.num_gpus == "all" or device not in {"cpu", "mps"} else 0.0
    if options.num_gpus == "all" and grows and not gpus and device not in {"cpu", "mps"}:
        raise ResourceError(
            "--num-gpus all: the cluster has no GPU yet and starts nodes on demand: say how many, such as "
            "--num-gpus 4"
        )
    if wants_gpus > gpus and not grows:
        raise ResourceError(_too_many_gpus(wants_gpus, f"the cluster has {gpus:g}"))
    if device is not None and device.startswith("cuda") and wants_gpus == 0:
        raise ResourceError(
            f"the config says device {device!r}, but there is no GPU to use: the cluster has {gpus:g} and "
            f"--num-gpus is {wants_gpus:g}. Set device to null or 'cpu', or join a cluster with GPUs"
        )
    if wants_gpus == 0:
        workers = options.num_workers or 1
        share = _cpu_share(cpus, workers)
        return WorkerResources(workers, 0.0, max(share, 1.0) if grows else share)
    per_worker = options.gpus_per_worker or server_gpus or 1.0 / options.workers_per_gpu
    fits = int(wants_gpus / per_worker + 1e-9)
    if fits < 1:
        raise ResourceError(f"--gpus-per-worker {per_worker:g} is more than the {wants_gpus:g} GPU(s) to use")
    workers = fits if options.num_workers is None else options.num_workers
    if workers > fits:
        raise ResourceError(
            f"--num-workers {workers} at {per_worker:g} GPU(s) each need {workers * per_worker:g} GPUs, and "
            f"{wants_gpus:g} may be used; lower it, or set --workers-per-gpu"
        )
    share = _cpu_share(cpus, workers)
    return WorkerResources(workers, per_worker, min(1.0, max(share, per_worker) if grows else share))


def _cpu_share(cpus: list[float], workers: int) -> float:
    """Return the CPUs of one worker, on one node: a whole number, or a fraction if there are few."""
    share = sum(cpus) / workers
    if share < 1.0:
        return int(share * 100) / 100.0
    fitting = (each for each in range(int(share), 1, -1) if sum(one // each for one in cpus) >= workers)
    return float(next(fitting, 1))
