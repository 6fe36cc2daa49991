"""A real server, `transformers serve` with the demo's model: its answers are those of `hf_text`."""

import contextlib
import copy
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
import torch
from demo_smollm2 import find_model
from small_study import MODEL, Study, environment, results
from transformers import AutoModelForCausalLM, AutoTokenizer

START_S = 240.0


class RealServer:
    """`transformers serve` on a port of the loopback; its log says what it was asked."""

    def __init__(self, folder: Path, model: Path = MODEL) -> None:
        self._model = model
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
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(self._model)]
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


def study_on(
    server: RealServer, folder: Path, model: Path = MODEL, settings: dict[str, Any] | None = None
) -> Study:
    kwargs = {"base_url": server.url, "model_id": str(model)}
    own = {"connector": "openai", "connector_kwargs": kwargs, **(settings or {})}
    return Study(folder, rows=2, words=4, settings=own)


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
    driver.wait_for(lambda: stored(study) >= 6)
    driver.kill(signal.SIGKILL)
    with pytest.raises(AssertionError):
        driver.wait_for(lambda: False)
    time.sleep(1.0)  # the server finishes what it is at
    kept = stored(study)
    assert 6 <= kept < 32
    again = server.answered
    found = study.call("--inline", "--resume")
    assert found.code == 0, found.out
    assert values(study) == on_this_machine
    assert server.answered - again == 32 - kept + 2


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


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32 as a plain directory, which `transformers serve` takes."""
    try:
        folder, name = find_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pytest.importorskip("fastapi")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config).to(torch.float32)  # a model that was read from GGUF cannot be saved
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    place = tmp_path_factory.mktemp("smollm2")
    plain.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(place)
    return place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not writable.*:UserWarning")
def test_a_real_model_behind_a_real_server_answers_as_hf_text(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, greedy, float32: 16 coalitions, text for text."""
    usual = {
        "generation": {"max_new_tokens": 12, "text_temperature": 0.0},
        "experiments": [{"explainer_type": "exact"}],
    }
    kwargs = {"model_id": str(smollm2), "dtype": "float32"}
    local = Study(tmp_path / "local", rows=1, settings={**usual, "connector_kwargs": kwargs})
    local.write_prompts("Name the largest ocean.")
    assert local.call("--inline").code == 0
    server = RealServer(tmp_path, smollm2)
    try:
        served = study_on(server, tmp_path / "served", smollm2, usual)
        served.write_prompts("Name the largest ocean.")
        found = served.call("--inline")
        assert found.code == 0, found.out
    finally:
        server.kill()
    assert len(texts(local)) == 16
    assert texts(served) == texts(local)
    assert values(served) == values(local)


def texts(study: Study) -> dict[bytes, str]:
    """Return the text of each stored answer by its coalition."""
    files = (study.output / "generations").rglob("*.parquet")
    return {row["mask"]: row["text"] for file in files for row in pq.read_table(file).to_pylist()}


def stored(study: Study) -> int:
    """Return how many answers are written out."""
    count = 0
    for file in (study.output / "generations").rglob("*.parquet"):
        with contextlib.suppress(FileNotFoundError):  # parts are packed into one file as a row ends
            count += pq.read_table(file).num_rows
    return count
