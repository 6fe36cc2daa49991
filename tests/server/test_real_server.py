"""A real server, `transformers serve` with the demo's model: its answers are those of `hf_text`."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from small_study import MODEL, Study, environment, results

START_S = 240.0


class RealServer:
    """`transformers serve` on a port of the loopback; its log says what it was asked."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._log = folder / "serve.txt"
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def answered(self) -> int:
        """Return the requests that it has answered."""
        return self._log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(MODEL)]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--device", "cpu", "--dtype", "float32"]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment({}))
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=1.0).is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    pytest.importorskip("fastapi")
    running = RealServer(tmp_path_factory.mktemp("serve"))
    yield running
    running.kill()


def study_on(server: RealServer, folder: Path) -> Study:
    kwargs = {"base_url": server.url, "model_id": str(MODEL)}
    return Study(folder, rows=2, words=4, settings={"connector": "openai", "connector_kwargs": kwargs})


def values(study: Study) -> dict[str, Any]:
    """Return all results without the device that they were made on and without counts of tokens."""
    found: dict[str, Any] = _without_tokens(results(study.output))
    for data in found.values():
        data.pop("environment", None)
    return found


def _without_tokens(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_tokens(value) for key, value in data.items() if not key.startswith("tokens_")}
    return [_without_tokens(item) for item in data] if isinstance(data, list) else data


@pytest.fixture(scope="module")
def on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    study = Study(tmp_path_factory.mktemp("hf_text"), rows=2, words=4)
    assert study.call("--inline").code == 0
    return values(study)


@pytest.mark.slow
def test_a_real_server_gives_the_samples_of_hf_text(
    server: RealServer, on_this_machine: dict[str, Any], tmp_path: Path
) -> None:
    study = study_on(server, tmp_path)
    before = server.answered
    found = study.call("--inline")
    assert found.code == 0, found.out
    assert values(study) == on_this_machine
    assert server.answered - before == 32 + 2  # two requests of one token say which model it is


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_asks_again_only_what_was_not_written(
    server: RealServer, on_this_machine: dict[str, Any], tmp_path: Path
) -> None:
    study = study_on(server, tmp_path)
    driver = study.start("--inline", "--flush-every", "0.1")
    before = server.answered
    driver.wait_for(lambda: stored(study) >= 6)
    driver.kill(signal.SIGKILL)
    with pytest.raises(AssertionError):
        driver.wait_for(lambda: False)
    time.sleep(1.0)  # the server finishes what it is at
    kept, asked = stored(study), server.answered - before
    assert 6 <= kept < 32
    again = server.answered
    found = study.call("--inline", "--resume")
    assert found.code == 0, found.out
    assert values(study) == on_this_machine
    assert server.answered - again == 32 - kept + 2
    assert asked - 2 - kept <= 12, "answers that came in the last moments before the kill"


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_is_waited_for(
    server: RealServer, on_this_machine: dict[str, Any], tmp_path: Path
) -> None:
    study = study_on(server, tmp_path)
    driver = study.start("--inline", "--flush-every", "0.1")
    driver.wait_for(lambda: stored(study) >= 6)
    server.kill()
    server.start()
    assert driver.wait().code == 0, driver.out
    assert values(study) == on_this_machine
    assert not list(study.output.glob("*/failures/*"))


def stored(study: Study) -> int:
    """Return how many answers are written out."""
    files = (study.output / "generations").rglob("*.parquet")
    return sum(pq.read_table(file).num_rows for file in files)
