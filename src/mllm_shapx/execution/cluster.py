"""Joins a Ray cluster, or starts one on this machine."""

import contextlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mllm_shapx.errors import ResourceError
from mllm_shapx.execution.address import probe
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.resources import check_gpus
from mllm_shapx.execution.scratch import scratch_folder
from mllm_shapx.execution.signals import JOB_VARIABLE, StopNow, StopRequest

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
NODES_S = 300.0
"""Seconds that the nodes of --wait-for-nodes may take to join."""

_PASSED_ON = (
    *("LOG_LEVEL", "ALLOW_UNPINNED_HF_DOWNLOAD"),
    *("WANDB_", "MLFLOW_", "HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "MKL_", "TOKENIZERS_"),
)
"""Beginnings of the driver's variables that workers on every node need. Others come from `ray start`."""
_SECRET_WORDS = frozenset(
    {"TOKEN", "TOKENS", "KEY", "KEYS", "APIKEY", "SECRET", "PASSWORD", "AUTH", "HEADERS"}
)
_SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's `Node` that start the dashboard, the autoscaler and the log copier."""
_LOGIN = re.compile(r"://[^/]*@")


@contextlib.contextmanager
def connected(options: RunOptions, request: StopRequest | None = None) -> Iterator[Path]:
    """Join the cluster of --address or RAY_ADDRESS, else start one on this machine; leave it at the end.

    Yields:
        A folder on this machine, open only to this user and removed at the end.

    Raises:
        ResourceError: If there is no cluster at the address, or none can be started.
    """
    request = request or StopRequest()
    given = {"--address": options.address, "RAY_ADDRESS": os.environ.get("RAY_ADDRESS")}
    origin, address = next(((name, value) for name, value in given.items() if value), ("", "local"))
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        stack.enter_context(request.at_the_last(partial(shutil.rmtree, folder, ignore_errors=True)))
        if address == "local":
            check_gpus(options)
            end = partial(_end_processes, folder)
            stack.enter_context(request.at_the_last(end))
            stack.callback(end)
            stack.enter_context(_closed_to_others(folder))
        else:
            probe(address, origin)
        stack.callback(_leave)
        with logged_output(), _own_handlers(request):
            if address == "local":
                _start_here(folder)
            else:
                _join(address, origin)
        _await_nodes(options.nodes)
        yield folder


@contextlib.contextmanager
def _closed_to_others(folder: Path) -> Iterator[None]:
    """Give the cluster to be started its own token, and let it listen on loopback only.

    Ray replaces 127.0.0.1 by a network interface's address and listens on all interfaces, unless
    `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` is 0, the default on Windows and macOS.
    """
    import ray  # noqa: F401 -- before the environment changes
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    def read_settings() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": None,
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    before = ray_constants.ENABLE_RAY_CLUSTER
    try:
        with _changed_environment(settings):
            ray_constants.ENABLE_RAY_CLUSTER = False
            read_settings()
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        read_settings()


@contextlib.contextmanager
def _changed_environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Set environment variables, or remove those that are None, and restore the old ones."""
    before = {name: os.environ.pop(name, None) for name in changes}
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    try:
        yield
    finally:
        for name in changes:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _own_handlers(request: StopRequest) -> Iterator[None]:
    """Restore our handlers after `ray.init`, whose handler for SIGTERM ends the process silently."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        # During its calls, Ray turns a handler's exception into exit code 1.
        if not isinstance(end, StopNow) and (request.seen or end.code == signal.SIGTERM):
            request.handle(request.seen or signal.SIGTERM, None)
        raise
    finally:
        with contextlib.suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGTERM, before)


def _leave() -> None:
    if "ray" not in sys.modules:  # a signal came during its import, which cannot be repeated
        return
    import ray

    with logged_output():
        ray.shutdown()


def _end_processes(folder: Path) -> None:
    """End the cluster's remaining processes in `folder`; an interrupted start leaves some."""
    import psutil

    left = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in child.cmdline()):
                left += [*child.children(recursive=True), child]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5.0)


class _Logged(io.TextIOBase):
    """Logs Ray's prints: standard output is for results, and the driver reports dead workers."""

    def write(self, text: str, /) -> int:
        if text.strip():
            logger.info("%s", text.strip())
        return len(text)


def logged_output() -> contextlib.redirect_stdout[_Logged]:
    """Return a context that logs Ray's prints."""
    return contextlib.redirect_stdout(_Logged())


def _join(address: str, origin: str) -> None:
    import ray

    try:
        ray.init(address=address, **_init_options(_public_environment()))
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ResourceError(
            f"the Ray cluster at {address!r} (from {origin}) could not be joined: {error}. Correct "
            "--address or RAY_ADDRESS, or leave both out to run on this machine alone"
        ) from error


def _await_nodes(wanted: int) -> None:
    """Wait until the cluster has `wanted` living nodes."""
    import ray

    deadline = time.monotonic() + NODES_S
    while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            raise ResourceError(
                f"--wait-for-nodes {wanted}: only {there} node(s) of the Ray cluster are there after "
                f"{NODES_S:g} s. Look at what `ray start` says on the others, or ask for fewer nodes"
            )
        time.sleep(0.5)


def _start_here(folder: Path) -> None:
    """Start a cluster on this machine. Ray gives its processes 30 s; a busy machine may need more."""
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            # Its processes inherit the environment with its secrets: nothing to pass on.
            with _without_services():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    _temp_dir=str(folder / "r"),  # Ray opens it to all users; `folder` is closed
                    **_init_options(_source_path()),
                )
        except Exception as error:
            ray.shutdown()
            _end_processes(folder)
            if attempt == START_ATTEMPTS:
                raise ResourceError(
                    f"Ray could not be started on this machine ({START_ATTEMPTS} attempts, with its files in "
                    f"{folder}): {error}. Try again when the machine is less busy, name another folder in "
                    "RAY_TMPDIR, or give --inline to do without Ray"
                ) from error
            logger.warning("Ray did not start (%s); trying again", error)
        else:
            return


@contextlib.contextmanager
def _without_services() -> Iterator[None]:
    """Start neither Ray's processes for people who watch a cluster nor its autoscaler.

    Each takes a second of CPU time. `ray.init` waits for some of them, `ray.shutdown` for all.
    """
    from ray._private.node import Node

    # A Ray without these names still works.
    before = {name: getattr(Node, name) for name in _SERVICES if hasattr(Node, name)}
    try:
        for name in before:
            setattr(Node, name, lambda *_, **__: None)
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _init_options(variables: dict[str, str]) -> dict[str, Any]:
    return {
        "runtime_env": {"env_vars": variables},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }


def _public_environment() -> dict[str, str]:
    """Return the driver's variables that workers on other nodes need.

    Without secrets: Ray writes them to logs that other users may read.
    """
    passed = {name: value for name, value in _passed_on() if not _is_secret(name, value)}
    taken = _variables_of_the_job()
    return {name: value for name, value in {**passed, **_source_path()}.items() if name not in taken}


def private_environment() -> dict[str, str]:
    """Return the secrets that actors on this machine need, for a file that only this user can read."""
    return {name: value for name, value in _passed_on() if _is_secret(name, value)}


def _passed_on() -> list[tuple[str, str]]:
    return [(name, value) for name, value in os.environ.items() if name.startswith(_PASSED_ON)]


def _is_secret(name: str, value: str) -> bool:
    """Return whether an environment variable holds a secret: by its name, or a login in a URL."""
    words = name.upper().split("_")
    if words[-1] in {"PATH", "FILE"}:
        return False
    return not _SECRET_WORDS.isdisjoint(words) or _LOGIN.search(value) is not None


def _source_path() -> dict[str, str]:
    """Return the variables that let workers import from the source tree MLLM_SHAP_SRC."""
    source = os.environ.get("MLLM_SHAP_SRC")
    if not source:
        return {}
    path = [str(Path(source).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"MLLM_SHAP_SRC": source, "PYTHONPATH": os.pathsep.join(path)}


def _variables_of_the_job() -> frozenset[str]:
    """Return the variables that the submitted Ray job sets itself: Ray refuses to set one twice."""
    try:
        submitted = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
        return frozenset(submitted["runtime_env"]["env_vars"])
    except (ValueError, KeyError, TypeError):
        return frozenset()
