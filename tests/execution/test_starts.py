"""A cluster of the run's own: signals at its start, what others on the machine see, what it leaves behind."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from ray_cluster import free_ports
from small_study import Sabotage, Study, environment

from mllm_shapx.execution import scratch
from mllm_shapx.execution.scratch import scratch_folder

SHARED = "study.pickle"
MARK = "a-secret-that-nobody-may-see"
NOBODY = 65534


IN_TERMINAL = """
import os, pty, select, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "mllm_shapx", *sys.argv[1:]])
print(pid, flush=True)
while sys.stdin not in (ready := select.select([terminal, sys.stdin], [], [])[0]):
    os.read(terminal, 65536)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Runs the command line in a terminal of its own, which is closed when a line comes in."""


def folder_of(pid: int) -> Path | None:
    """Return the scratch folder of a run, from the command lines of Ray's processes."""
    for process in family(pid):
        if found := re.search(rf"=(/\S*/{scratch.PREFIX}\w+)/", title(process)):
            return Path(found[1])
    return None


def family(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def have_ended(processes: list[psutil.Process]) -> bool:
    """Return whether processes end within seconds; a zombie has ended."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def check_alive(port: int, token: str | None) -> str:
    """Return the gRPC status of a call to the GCS."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def submit_job(port: int) -> int | None:
    """Return the HTTP status with which an agent answers a job, None when it speaks no HTTP."""
    url = f"http://127.0.0.1:{port}/api/job_agent/jobs/"
    body = json.dumps({"entrypoint": "id"}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "program"),
    [(signal.SIGTERM, 143, "gcs_server"), (signal.SIGHUP, 129, "raylet_socket_name")],
)
def test_a_signal_while_ray_starts_ends_it_with_the_code_and_the_line_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int, program: str
) -> None:
    study = Study(tmp_path, rows=2)
    run = study.start("--num-workers", "1")
    run.wait_for(lambda: any(program in title(process) for process in family(run.pid)))
    folder, processes = folder_of(run.pid), family(run.pid)
    run.kill(number)
    ended = run.wait(30)
    assert ended.code == code
    assert ended.out.strip() == (
        f"{number.name}: stopped; to go on: mllm-shapx run --config {study.config} --resume --num-workers 1"
    )
    assert folder is not None
    assert not folder.exists()
    assert have_ended(processes)
    assert not study.output.exists()


@pytest.mark.slow
def test_a_second_signal_ends_a_run_on_ray_at_once_with_its_code(tmp_path: Path) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=[0, 1], slow_s=600)
    study = Study(tmp_path, rows=2, env=saboteur.env)
    run = study.start("--num-workers", "1")
    run.wait_for(lambda: "1/1 workers busy" in run.out)
    processes = family(run.pid)
    run.kill(signal.SIGTERM)
    run.wait_for(lambda: "SIGTERM: finishing" in run.out)
    run.kill(signal.SIGTERM)
    ended = run.wait(20)
    assert ended.code == 143
    assert "stopped at once; what was written is valid; to go on: mllm-shapx run" in ended.out
    assert have_ended(processes)
    assert not (study.output / ".lock").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_others_on_the_machine_see_and_reach_nothing_of_a_run_and_a_closed_terminal_drains_it(
    tmp_path: Path,
) -> None:
    saboteur = Sabotage(tmp_path)
    saboteur.set(slow=list(range(30)), slow_s=0.7)
    secrets = {"WANDB_API_KEY": MARK, "HF_TOKEN": MARK, "RAY_AUTH_TOKEN": MARK, "RAY_AUTH_MODE": "disabled"}
    missing = {"TMPDIR": str(tmp_path / "missing" / ("x" * 100))}
    study = Study(tmp_path, rows=30, env={**saboteur.env, **secrets, **missing})
    command = [sys.executable, "-c", IN_TERMINAL, "run", "--config", str(study.config)]
    with subprocess.Popen(
        [*command, "--num-workers", "1", "--grace", "20"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(study.env),
    ) as terminal:
        assert terminal.stdout is not None
        pid = int(terminal.stdout.readline())
        deadline = time.monotonic() + 120
        while study.samples_on_disk() < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        folder, processes = folder_of(pid), family(pid)
        assert folder is not None
        hold_that_nobody_reads(folder, processes)
        hold_that_nobody_connects(folder, [psutil.Process(pid), *processes])
        # Closing the terminal sends SIGHUP to all its processes.
        said, _ = terminal.communicate("close\n", timeout=60)
    assert said.strip() == "129"
    assert 3 <= study.samples_on_disk() < 90
    checkpoint = json.loads((study.output / "exact" / "checkpoint.json").read_text())
    assert len(checkpoint["completed_indices"]) == len(list(study.output.glob("exact/samples/*.json")))
    assert not (study.output / ".lock").exists()
    assert not folder.exists()
    assert have_ended(processes)


def hold_that_nobody_reads(folder: Path, processes: list[psutil.Process]) -> None:
    """Hold that no other user enters the folder, and that neither it nor a command line has a secret."""
    assert folder.stat().st_mode & 0o777 == 0o700
    token = (folder / "token").read_text()
    secret = re.compile(f"{MARK}|{token}".encode())
    private = {folder / "token", folder / SHARED}
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert {path for path in files if secret.search(path.read_bytes())} == private
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in private)
    assert not [process for process in processes if secret.search(title(process).encode())]
    if os.geteuid() != 0:
        return  # nobody else's eyes can be borrowed
    environments = [f"/proc/{process.pid}/environ" for process in processes]
    look = ["grep", "-rl", "-e", MARK, "-e", token, str(folder), *environments]
    seen = subprocess.run(
        look, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=False
    )
    assert seen.stdout == ""
    assert f"{folder}: Permission denied" in seen.stderr


def hold_that_nobody_connects(folder: Path, processes: list[psutil.Process]) -> None:
    """Hold that the processes listen on loopback only, and do nothing for those who have no token."""
    listeners = [
        (process, connection.laddr)
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listeners) >= 8
    assert {address.ip for _, address in listeners} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    gcs = next(address.port for process, address in listeners if "gcs_server" in title(process))
    assert check_alive(gcs, None) == "UNAUTHENTICATED"
    assert check_alive(gcs, MARK) == "UNAUTHENTICATED"
    assert check_alive(gcs, (folder / "token").read_text()) == "OK"
    answers = {submit_job(address.port) for process, address in listeners if "Agent" in title(process)}
    assert 401 in answers
    assert 200 not in answers


KILLED = """
import time
from mllm_shapx.execution.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "socket").touch()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_the_folder_of_a_killed_run_is_removed_by_the_next_and_that_of_a_living_one_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tempfile.mkdtemp(prefix="b-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", base)
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        assert left.parent == Path(base)
        with scratch_folder():
            assert left.exists()
        process.kill()
    with scratch_folder() as own:
        assert not left.exists()
        assert own.stat().st_mode & 0o777 == 0o700
    assert not list(Path(base).iterdir())
    Path(base).rmdir()


def test_agents_of_ray_that_outlive_a_killed_run_are_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_base", lambda: tmp_path)
    folder = Path(tempfile.mkdtemp(prefix=scratch.PREFIX, dir=tmp_path))
    with (folder / "agent.log").open("w") as log:
        agent, reader = (
            subprocess.Popen([name, "60"], executable="/bin/sleep", stdout=log)
            for name in ("ray::DashboardAgent", "less")
        )
    with scratch_folder():
        assert agent.wait(10) == -signal.SIGKILL
        assert reader.poll() is None
    reader.kill()
    reader.wait()
    assert not folder.exists()


def test_a_cluster_that_is_gone_is_named_within_ten_seconds_and_a_signal_is_heard_meanwhile(
    tmp_path: Path,
) -> None:
    study = Study(tmp_path, rows=1)
    (port,) = free_ports(1)
    ended = study.run("--address", f"127.0.0.1:{port}", timeout=30)
    assert ended.code == 2
    assert f"there is no Ray cluster at '127.0.0.1:{port}' (from --address): nothing answers" in ended.out
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        run = study.start(env={"RAY_ADDRESS": address})
        silent.accept()[0].close()
        run.kill(signal.SIGTERM)
        ended = run.wait(8)
        assert ended.code == 143
        assert f"to go on: mllm-shapx run --config {study.config} --resume" in ended.out
        ended = study.run(env={"RAY_ADDRESS": address}, timeout=30)
    assert ended.code == 2
    assert f"there is no Ray cluster at '{address}' (from RAY_ADDRESS)" in ended.out
    assert not study.output.exists()


def test_gpus_that_a_machine_has_not_got_are_refused_before_ray_is_imported(tmp_path: Path) -> None:
    study = Study(tmp_path, rows=1)
    ended = study.run("--num-gpus", "1", env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPROFILEIMPORTTIME": "1"})
    assert ended.code == 2
    assert "--num-gpus 1 asks for more GPUs than there are: this machine has none" in ended.out
    assert re.search(r"\| +mllm_shapx.execution.cluster\n", ended.out)
    assert not re.search(r"\| +ray\n", ended.out)
