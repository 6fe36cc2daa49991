"""A worker's own server: started on a free loopback port, and ended with the worker."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import httpx

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError
from mllm_shapx.models import server_guardian
from mllm_shapx.models.identity import directory_digest, file_digest

HOST = "127.0.0.1"
START_S = 600.0
"""Seconds that a server may take to become healthy, unless the config says otherwise."""
PORT_TRIES = 3
"""Ports that are tried where another program takes the port in the moment before the server does."""
LOOK_S = 0.2
TAIL_LINES = 20
_TAIL_BYTES = 16_384
_KEY = "connector_kwargs.server.command"
_PORT_TAKEN = ("address already in use", "address in use", "errno 98")


class OwnServer:
    """A server of this process. Its log is a temporary file without a name.

    Args:
        command: The program and its arguments, with the placeholders `{port}`, `{host}` and `{model_id}`.
        model: What `{model_id}` stands for.
        start_s: Seconds that it may take to become healthy.

    Raises:
        ModelError: When it ends or stays unhealthy; the message ends with the last lines of its log.
    """

    def __init__(self, command: Sequence[str], model: str, start_s: float = START_S) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- `close` closes it
        for attempt in range(1, PORT_TRIES + 1):
            port = _free_port()
            self.root = f"http://{HOST}:{port}"
            self._start(_filled(command, port, model))
            try:
                self._await(start_s)
            except BaseException as error:
                self._end()
                may_retry = isinstance(error, ModelError) and attempt < PORT_TRIES
                if not (may_retry and self._found_its_port_taken()):
                    self._log.close()
                    raise
            else:
                return

    @property
    def base_url(self) -> str:
        """Return its address."""
        return f"{self.root}/v1"

    @property
    def exit_code(self) -> int | None:
        """Return its exit code, None while it runs."""
        return self._guardian.poll()

    @property
    def log_tail(self) -> str:
        """Return the last lines of its log."""
        number = self._log.fileno()
        # The server writes at the file's position: it must not be moved.
        end = os.pread(number, _TAIL_BYTES, max(0, os.fstat(number).st_size - _TAIL_BYTES))
        return "\n".join(end.decode(errors="replace").splitlines()[-TAIL_LINES:])

    def close(self) -> None:
        """End it with all processes that it has started."""
        self._end()
        self._log.close()

    def _start(self, command: Sequence[str]) -> None:
        guardian = [sys.executable, "-I", str(Path(server_guardian.__file__)), *command]
        self._guardian = subprocess.Popen(  # noqa: S603 -- the user's own command
            guardian, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def _found_its_port_taken(self) -> bool:
        text = self.log_tail.lower()
        return any(words in text for words in _PORT_TAKEN)

    def _end(self) -> None:
        if self._guardian.stdin is not None:
            with contextlib.suppress(OSError):
                self._guardian.stdin.close()
        try:
            self._guardian.wait(3 * server_guardian.GRACE_S)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()

    def _await(self, start_s: float) -> None:
        deadline = time.monotonic() + start_s
        while not self._is_healthy():
            if (code := self.exit_code) is not None:
                self._fail(f"the server ended with exit code {code}")
            if time.monotonic() > deadline:
                self._fail(f"the server is not healthy after {start_s:g} s (connector_kwargs.server.start_s)")
            time.sleep(LOOK_S)

    def _fail(self, why: str) -> NoReturn:
        raise ModelError(f"{_KEY}: {why}; its log ends with\n{self.log_tail}")

    def _is_healthy(self) -> bool:
        """Return whether it answers at /health; at /v1/models where it has no /health."""
        try:
            found = httpx.get(f"{self.root}/health", timeout=5.0)
            if found.status_code == httpx.codes.NOT_FOUND:
                found = httpx.get(f"{self.base_url}/models", timeout=5.0)
        except httpx.HTTPError:
            return False
        return found.status_code == httpx.codes.OK and self.exit_code is None


def own_server_commit(settings: ModelSettings, model_path: Path | None) -> str:
    """Return the version of a model that a worker's own server answers with.

    It is a hash of the command, and of the model's files where `model_id` is a local directory or file.

    Raises:
        ModelError: When a file cannot be read.
    """
    server = settings.kwargs.server
    assert server is not None  # noqa: S101 -- for the type checker
    files = None
    if model_path is not None:
        files = directory_digest(model_path) if model_path.is_dir() else file_digest(model_path)
    told = json.dumps([list(server.command), settings.model_id if files is None else files])
    return f"own-server-{hashlib.sha256(told.encode()).hexdigest()[:32]}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


def _filled(command: Sequence[str], port: int, model: str) -> list[str]:
    return [
        part.replace("{port}", str(port)).replace("{host}", HOST).replace("{model_id}", model)
        for part in command
    ]
