"""Servers that workers start themselves: they begin with the worker and end with it, whatever ends it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_server
import psutil
import pytest
from chat_server import ChatServer
from small_study import MODEL, Process, Study, results

from mllm_shapx.config.loading import load_config
from mllm_shapx.errors import ConfigError
from mllm_shapx.planning.sweep import expand

PROGRAM = str(Path(chat_server.__file__))
EXACT: list[dict[str, Any]] = [{"explainer_type": "exact"}]


def study_with(folder: Path, *command: str, **server: Any) -> Study:
    kwargs = {"model_id": "tiny", "server": {"command": list(command), **server}}
    settings = {"connector": "openai", "connector_kwargs": kwargs, "experiments": EXACT}
    return Study(folder, rows=2, words=4, settings=settings)


def servers(marker: str) -> list[psutil.Process]:
    """Return the processes that have `marker` among their arguments and run the test's server."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if line[1:2] == [PROGRAM] and marker in line and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone_within(marker: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while servers(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not servers(marker)


def test_a_worker_starts_its_server_and_ends_it(tmp_path: Path) -> None:
    study = study_with(tmp_path / "own", sys.executable, PROGRAM, "{port}", "0", str(tmp_path))
    found = study.call("--inline")
    assert found.code == 0, found.out
    assert not servers(str(tmp_path))
    with ChatServer() as server:
        kwargs = {"base_url": server.url, "model_id": "tiny"}
        settings = {"connector": "openai", "connector_kwargs": kwargs, "experiments": EXACT}
        other = Study(tmp_path / "other", rows=2, words=4, settings=settings)
        assert other.call("--inline").code == 0
    ours, theirs = results(study.output), results(other.output)
    for data in (*ours.values(), *theirs.values()):
        data.pop("environment", None)
    assert ours == theirs
    spec = json.loads((study.output / "exact" / "spec.json").read_text())
    assert spec["result_settings"]["model_commit"].startswith("own-server-")
    assert study.call("--inline", "--resume").code == 0


def test_a_killed_worker_takes_its_server_with_it_and_resuming_starts_another(tmp_path: Path) -> None:
    study = study_with(tmp_path, sys.executable, PROGRAM, "{port}", "0.3", str(tmp_path))
    driver = study.start("--inline", "--flush-every", "0.1")
    driver.wait_for(lambda: any((study.output / "generations").rglob("*.parquet")))
    assert len(servers(str(tmp_path))) == 1
    driver.kill(signal.SIGKILL)
    assert gone_within(str(tmp_path), 15.0)
    found = study.call("--inline", "--resume")
    assert found.code == 0, found.out
    assert not servers(str(tmp_path))


def test_the_server_sees_the_gpus_of_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    seen = tmp_path / "seen.txt"
    shell = f'echo "$CUDA_VISIBLE_DEVICES" > {seen}; exec {sys.executable} {PROGRAM} {{port}}'
    study = study_with(tmp_path, "sh", "-c", shell, gpus=2)
    assert study.call("--inline").code == 0
    assert seen.read_text() == "2,3\n"


@pytest.mark.parametrize(
    ("command", "server", "said"),
    [
        (
            (sys.executable, "-c", "print('no {port} for me'); raise SystemExit(7)"),
            {},
            "exit code 7",
        ),
        (("no-such-program", "{port}"), {}, "No such file or directory"),
        (
            (sys.executable, "-c", "import time; print('loading {port}', flush=True); time.sleep(60)"),
            {"start_s": 1.5},
            "is not healthy after 1.5 s",
        ),
    ],
)
def test_a_server_that_does_not_come_up_is_named_with_its_log(
    command: tuple[str, ...], server: dict[str, Any], said: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    found = study_with(tmp_path, *command, **server).call("--inline")
    assert found.code == 2, found.out
    assert said in found.out
    assert "its log ends with" in found.out
    assert command[0] != sys.executable or "for me" in found.out or "loading" in found.out
    assert time.monotonic() - started < 30.0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no port": ({"command": ["vllm", "serve", "{model_id}"]}, 'must hold "{port}"'),
    "nothing": ({"command": []}, "must name a program"),
    "gpus": ({"command": ["vllm", "{port}"], "gpus": 5000}, "no machine has more"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_block_is_refused(wrong: str, tmp_path: Path) -> None:
    server, said = WRONG[wrong]
    study = study_with(tmp_path, "x")
    kwargs = {"model_id": "tiny", "server": server}
    study.write_config(connector_kwargs=kwargs)
    with pytest.raises(ConfigError, match=said):
        load_config(study.config)


def test_a_server_and_an_address_exclude_each_other(tmp_path: Path) -> None:
    study = study_with(tmp_path, "x", "{port}")
    kwargs = {"model_id": "t", "base_url": "http://localhost:1/v1", "server": {"command": ["x", "{port}"]}}
    study.write_config(connector_kwargs=kwargs)
    with pytest.raises(ConfigError, match="cannot stand beside"):
        load_config(study.config)


def test_the_command_is_part_of_the_generation_key(tmp_path: Path) -> None:
    keys = set()
    for precision in ("float32", "bfloat16"):
        study = study_with(tmp_path, "vllm", "serve", "{model_id}", "--port", "{port}", "--dtype", precision)
        keys.add(expand(load_config(study.config).experiment_set).runs[0].generation_key)
    assert len(keys) == 2


@pytest.mark.slow
def test_a_worker_of_ray_whose_server_is_killed_is_replaced_and_the_study_ends(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, "{port}", "0.5", str(tmp_path)]
    study = study_with(tmp_path, *command)
    kwargs = {"model_id": "tiny", "server": {"command": command}, "max_concurrency": 1}
    study.write_config(connector_kwargs=kwargs)
    driver = study.start("--num-workers", "1", "--flush-every", "0.1")
    driver.wait_for(lambda: any((study.output / "generations").rglob("*.parquet")))
    (server,) = servers(str(tmp_path))
    server.kill()
    found = driver.wait()
    assert found.code == 0, found.out
    assert "the server of this worker ended" in found.out
    assert study.samples_on_disk() == 2
    assert gone_within(str(tmp_path), 15.0)


@pytest.mark.slow
def test_a_kept_worker_ends_its_server_with_all_its_processes_before_the_next_one_starts(
    tmp_path: Path,
) -> None:
    """Ray kills a worker's children before they can react, and a GPU holds one server at a time."""
    program, told = tmp_path / "serve.py", tmp_path / "told.txt"
    program.write_text(
        "import os, signal, subprocess, sys, time\n"
        "def tell(what):\n"
        f"    open({str(told)!r}, 'a').write(sys.argv[2] + ' ' + what + '\\n')\n"
        "tell('starts')\n"
        f"below = subprocess.Popen([sys.executable, {PROGRAM!r}, sys.argv[1], '0', {str(tmp_path)!r}])\n"
        "def end(*_):\n"
        "    time.sleep(1.5)\n"
        "    tell('ends')\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "below.wait()\n"
    )
    studies = [
        study_with(tmp_path / name, sys.executable, str(program), "{port}", name) for name in ("a", "b")
    ]
    words = [word for study in studies for word in ("--config", str(study.config))]
    found = Process(["run", *words, "--num-workers", "1"], {}, tmp_path).wait()
    assert found.code == 0, found.out
    assert told.read_text().splitlines() == ["a starts", "a ends", "b starts", "b ends"]
    assert gone_within(str(tmp_path), 5.0)


def test_what_a_server_has_started_ends_when_its_worker_is_ended_by_ray(tmp_path: Path) -> None:
    """As Ray ends an actor: it kills the worker's children, then the worker."""
    shell = f"{sys.executable} {PROGRAM} {{port}} 0 {tmp_path} & wait"
    code = (
        "import os, psutil\n"
        "from mllm_shapx.models.server_process import OwnServer\n"
        f"server = OwnServer(['sh', '-c', {shell!r}], 'tiny')\n"
        "for child in psutil.Process().children():\n"
        "    child.kill()\n"
        "os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert gone_within(str(tmp_path), 15.0)


@pytest.mark.slow
def test_transformers_serve_started_by_the_worker_answers_as_hf_text(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", "{model_id}", "--host", "{host}", "--port", "{port}", "--device", "cpu"]
    study = study_with(tmp_path / "own", *command, "--dtype", "float32")
    kwargs = {"model_id": str(MODEL), "server": {"command": [*command, "--dtype", "float32"]}}
    study.write_config(connector_kwargs=kwargs)
    found = study.call("--inline")
    assert found.code == 0, found.out
    local = Study(tmp_path / "local", rows=2, words=4, settings={"experiments": EXACT})
    assert local.call("--inline").code == 0
    texts: Callable[[Study], list[Any]] = lambda each: [  # noqa: E731
        json.loads(path.read_text())["conversation"]
        for path in sorted(each.output.glob("exact/samples/*.json"))
    ]
    assert texts(study) == texts(local)
