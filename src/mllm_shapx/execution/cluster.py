"""Joining or starting a Ray cluster, and what the study may take of it."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_shapx.errors import ResourceError
from mllm_shapx.execution.options import RunOptions

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3

_PASSED_ON = ("MLLM_SHAP_SRC", "LOG_LEVEL", "ALLOW_UNPINNED_HF_DOWNLOAD")
_PASSED_ON_PREFIXES = ("WANDB_", "HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "MKL_", "TOKENIZERS_")
"""Environment of the driver that workers on every node need; `os.environ` set later does not reach them."""


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """How many workers there are and what each takes."""

    workers: int
    gpus: float
    """GPUs of one worker; 0 for a worker on the CPU."""
    cpus: float
    """CPUs of one worker; Ray sets the worker's OMP_NUM_THREADS to it."""


@contextlib.contextmanager
def connected(options: RunOptions) -> Iterator[None]:
    """Join the cluster of --address or RAY_ADDRESS, else start one on this machine; leave it at the end.

    Raises:
        ResourceError: When there is no cluster at the address.
    """
    import ray

    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with contextlib.redirect_stdout(_Logged()):
        if address == "local":
            _start_here()
        else:
            _join(address)
        try:
            yield
        finally:
            ray.shutdown()


class _Logged(io.TextIOBase):
    """Takes what Ray prints: standard output belongs to results, and of dead workers the driver tells."""

    def write(self, text: str, /) -> int:
        if text.strip():
            logger.info("%s", text.strip())
        return len(text)


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, **_init_options())
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"there is no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, correct "
            "--address (or RAY_ADDRESS), or leave it out to run on this machine alone"
        ) from error


def _start_here() -> None:
    """Start a cluster on this machine; Ray gives its own processes 30 s, which a busy machine may not."""
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            # Everything stays on this machine, so nothing of it needs to be reached from outside.
            ray.init(
                address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **_init_options()
            )
        except Exception as error:
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise ResourceError(
                    f"Ray could not be started on this machine ({START_ATTEMPTS} attempts): {error}. "
                    "Try again when the machine is less busy, or give --inline to do without Ray"
                ) from error
            logger.warning("Ray did not start (%s); trying again", error)
        else:
            return


def _init_options() -> dict[str, Any]:
    return {
        "runtime_env": {"env_vars": environment()},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }


def environment() -> dict[str, str]:
    """Return the driver's environment variables that workers need."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    if source := os.environ.get("MLLM_SHAP_SRC"):
        path = [str(Path(source).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        passed["PYTHONPATH"] = os.pathsep.join(path)
    return passed


def plan_resources(options: RunOptions, device: str | None) -> WorkerResources:
    """Return the workers to start, from what the call asks and the cluster has.

    Without --num-gpus every GPU of the cluster is used, unless `device` is the CPU.

    Raises:
        ResourceError: When the cluster has not got what is asked for.
    """
    import ray

    have: dict[str, Any] = ray.cluster_resources()
    gpus, cpus = float(have.get("GPU", 0.0)), float(have.get("CPU", 1.0))
    wants_gpus = (
        options.num_gpus if options.num_gpus is not None else (0.0 if device in {"cpu", "mps"} else gpus)
    )
    if wants_gpus > gpus:
        raise ResourceError(
            f"--num-gpus {wants_gpus:g} asks for more GPUs than there are: the cluster has {gpus:g}. "
            "Lower it, join a larger cluster with --address, or use --num-workers for workers on the CPU"
        )
    if device is not None and device.startswith("cuda") and wants_gpus == 0:
        raise ResourceError(
            f"the config says device {device!r}, but there is no GPU to use: the cluster has {gpus:g} and "
            f"--num-gpus is {wants_gpus:g}. Set device to null or 'cpu', or join a cluster with GPUs"
        )
    if wants_gpus == 0:
        workers = options.num_workers or 1
        return WorkerResources(workers, 0.0, _cpu_share(cpus, workers))
    per_worker = options.gpus_per_worker or 1.0 / options.workers_per_gpu
    fits = int(wants_gpus / per_worker + 1e-9)
    if fits < 1:
        raise ResourceError(f"--gpus-per-worker {per_worker:g} is more than the {wants_gpus:g} GPU(s) to use")
    workers = fits if options.num_workers is None else options.num_workers
    if workers > fits:
        raise ResourceError(
            f"--num-workers {workers} at {per_worker:g} GPU(s) each need {workers * per_worker:g} GPUs, and "
            f"{wants_gpus:g} may be used; lower it, or set --workers-per-gpu"
        )
    return WorkerResources(workers, per_worker, min(1.0, _cpu_share(cpus, workers)))


def _cpu_share(cpus: float, workers: int) -> float:
    """Return CPUs per worker: whole ones where there are enough, else equal parts of what there is."""
    share = cpus / workers
    return float(int(share)) if share >= 1.0 else int(share * 100) / 100.0
