"""A separate Ray cluster on loopback: `ray start` in the foreground, ended by its process id."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil

START_S = 120.0
"""Seconds that a node may take to start on a busy machine."""

_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Lets Ray listen on loopback only; Ray names it after the systems where that is the default."""
_RAY = """
from ray._private import ray_constants, services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
ray_constants.ENABLE_RAY_CLUSTER = True
from ray.scripts.scripts import main
main()
"""
"""The command `ray`, patched to accept a second node on loopback."""
_HIDE = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
"""Runs a command that sees an empty folder."""


class Node:
    """One node: the `ray start` process and its children."""

    def __init__(self, args: list[str], env: Mapping[str, str], log: Path, hidden: Path | None) -> None:
        self.log = log
        without = [] if hidden is None else ["unshare", "--mount", "sh", "-c", _HIDE, str(hidden)]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*without, sys.executable, "-c", _RAY, "start", "--block", *args],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )

    def wait_started(self) -> None:
        """Wait until Ray reports that the node runs."""
        deadline = time.monotonic() + START_S
        while not self.has_started():
            if self.has_ended() or time.monotonic() > deadline:
                raise AssertionError(f"the node did not start:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.1)

    def has_started(self) -> bool:
        """Return whether Ray has reported that the node runs."""
        return "Ray runtime started" in self.log.read_text(errors="replace")

    def has_ended(self) -> bool:
        """Return whether the node has ended or failed to start."""
        return self._process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return the node's living processes, workers included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self._process.pid).children(recursive=True))
        return []

    def raylet(self) -> psutil.Process | None:
        """Return the process that starts the node's workers."""
        return next((process for process in self.processes() if _name(process) == "raylet"), None)

    def stop(self) -> None:
        """End the node and all its processes."""
        processes = self.processes()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait()


class LoopbackCluster:
    """A head and, on demand, more nodes on this machine.

    Args:
        cpus: Logical CPUs of the head.
        gpus: Logical GPUs of the head; real ones are not needed.
        dashboard: Whether the job server runs, for `ray job submit`.
        env: Further environment variables of the workers.
        token: Required token of drivers; without it the cluster accepts all.
        more_nodes: Nodes of one CPU and one logical GPU that an autoscaler may start; None for no autoscaler.
    """

    def __init__(
        self,
        *,
        cpus: int,
        gpus: int = 0,
        dashboard: bool = False,
        env: Mapping[str, str] | None = None,
        token: str | None = None,
        more_nodes: int | None = None,
    ) -> None:
        # Socket paths must be short: a test's own folder is too long.
        self._folder = Path(tempfile.mkdtemp(prefix="shapx-ray-", dir="/tmp"))
        port, client_port, agent_port, self.dashboard_port = free_ports(4)
        self.address = f"127.0.0.1:{port}"
        self.env = {"RAY_AUTH_MODE": "disabled", **_ONE_MACHINE}
        """Required environment of a driver on this cluster."""
        if token is not None:
            self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **_ONE_MACHINE}
        self._env = {
            # Without a list of real GPUs, to allow logical ones.
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CUDA_"))},
            **self.env,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        args = ["--head", f"--port={port}", f"--temp-dir={self._folder / 't'}", f"--num-gpus={gpus}"]
        if dashboard:
            args += ["--include-dashboard=true", f"--dashboard-port={self.dashboard_port}"]
            args += ["--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent_port}"]
        else:
            args += ["--include-dashboard=false"]
        if more_nodes is not None:
            self._env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            args += [f"--autoscaling-config={self._autoscaling_config(more_nodes)}"]
        self.nodes: list[Node] = []
        self.head = self._start([*args, f"--ray-client-server-port={client_port}"], cpus)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_node(
        self, *, cpus: int, wait: bool = True, name: str | None = None, hidden: Path | None = None
    ) -> Node:
        """Start one more node, which sees `hidden` as an empty folder; that needs root."""
        args = [f"--address={self.address}", "--num-gpus=0", *([f"--node-name={name}"] if name else [])]
        return self._start(args, cpus, wait=wait, hidden=hidden)

    @property
    def folder(self) -> Path:
        """Return the folder of the cluster's logs and sockets."""
        return self._folder

    def nodes_asked(self) -> list[dict[str, float]] | None:
        """Return the bundles of the request to the autoscaler; None if there was none."""
        from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        client = GcsClient(address=self.address)
        found = client.internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL, None)
        return None if found is None else list(json.loads(found))

    def _autoscaling_config(self, more_nodes: int) -> Path:
        """Write the cluster file of Ray's own provider for tests, which starts nodes on this machine."""
        node = {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}
        lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
        more = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
        settings = {
            "cluster_name": "test",
            "max_workers": more_nodes,
            "idle_timeout_minutes": 60,
            "upscaling_speed": 10.0,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "gpu": {"resources": node, "node_config": {}, "max_workers": more_nodes},
            },
            "head_node_type": "ray.head.default",
            "auth": {},
            "file_mounts": {},
            **{name: [] for name in (*lists, *more, "rsync_exclude", "rsync_filter")},
        }
        path = self._folder / "autoscaling.yaml"
        path.write_text(json.dumps(settings))
        return path

    def processes(self, name: str) -> Iterator[psutil.Process]:
        """Yield the living processes whose title contains `name`, for example `ray::WorkerActor`."""
        for node in self.nodes:
            for process in node.processes():
                if name in _name(process):
                    yield process

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        for node in reversed(self.nodes):
            node.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, args: list[str], cpus: int, *, wait: bool = True, hidden: Path | None = None) -> Node:
        common = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--disable-usage-stats"]
        common += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        node = Node([*args, *common], self._env, self._folder / f"node-{len(self.nodes)}.log", hidden)
        self.nodes.append(node)
        try:
            if wait:
                node.wait_started()
        except AssertionError:
            self.stop()
            raise
        return node


def free_ports(count: int) -> list[int]:
    """Return free ports of loopback."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def _name(process: psutil.Process) -> str:
    """Return a process's title: Ray's workers set their own, others have their program's name."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return ""
    if not line:
        return ""
    return line[0] if line[0].startswith("ray::") else Path(line[0]).name
