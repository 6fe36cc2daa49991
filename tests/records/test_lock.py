"""Two drivers never write one directory, and a dead one never keeps the next from going on."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from records_kit import files_below

from mllm_shapx.errors import OutputError
from mllm_shapx.records.lock import LockHolder, OutputLock, lock_holder
from mllm_shapx.records.storage import FsspecStorage, LocalStorage, encode_json

HOLD = """
import sys, time
from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.storage import LocalStorage
OutputLock(LocalStorage(sys.argv[1]), heartbeat_s=0.1).acquire()
print("held", flush=True)
time.sleep(60)
"""

SECOND = """
import sys
from mllm_shapx.errors import OutputError
from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.storage import LocalStorage
lock = OutputLock(LocalStorage(sys.argv[1]), watch_s=1.5)
try:
    print(lock.acquire())
except OutputError as error:
    print(error)
lock.release()
"""


def _place(storage: LocalStorage, **changes: Any) -> LockHolder:
    """Write the lock file of some other driver."""
    holder = dataclasses.replace(LockHolder.of_this_process(), **changes)
    storage.write_bytes(".lock", encode_json(dataclasses.asdict(holder)))
    return holder


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "set")


@pytest.fixture
def driver(storage: LocalStorage) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, storage.uri], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_is_taken_held_and_given_up_without_a_trace(storage: LocalStorage, tmp_path: Path) -> None:
    lock = OutputLock(storage)
    assert lock.acquire() == ()
    data = json.loads((tmp_path / "set" / ".lock").read_text())
    assert data["pid"] == os.getpid()
    assert {"host", "process_started_at", "started_at", "heartbeat"} <= data.keys()
    assert lock_holder(storage) is not None
    lock.release()
    lock.release()
    assert files_below(tmp_path) == {}
    assert lock_holder(storage) is None


def test_a_second_driver_is_refused_with_the_first_ones_host_pid_and_start(
    storage: LocalStorage, driver: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(OutputError) as caught:
        OutputLock(storage).acquire()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    holder = lock_holder(storage)
    assert holder is not None
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started_at))
    assert f"in use by process {driver.pid} on {holder.host}, started {started}" in message
    assert f"kill {driver.pid}" in message


def test_the_lock_of_a_killed_driver_is_taken_over_at_once_and_said(
    storage: LocalStorage, driver: "subprocess.Popen[str]"
) -> None:
    driver.send_signal(signal.SIGKILL)
    # Not waited for: a zombie does no work either.
    deadline = time.monotonic() + 10
    while lock_holder(storage) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    lock = OutputLock(storage)
    (note,) = lock.acquire()
    assert f"took over the lock of process {driver.pid}" in note
    assert "no longer running" in note
    lock.check()
    lock.release()


def test_a_process_id_that_now_belongs_to_another_process_is_no_holder(storage: LocalStorage) -> None:
    _place(storage, start_ticks=1)
    lock = OutputLock(storage)
    assert len(lock.acquire()) == 1
    lock.release()


def test_another_host_is_believed_while_its_heartbeat_is_fresh_and_the_message_says_what_to_do(
    storage: LocalStorage,
) -> None:
    _place(storage, host="node7", pid=4321, heartbeat=time.time() - 40)
    with pytest.raises(OutputError, match=r"process 4321 on node7, .*last seen 4\d s ago") as caught:
        OutputLock(storage).acquire()
    assert f"remove {storage.uri}/.lock" in str(caught.value)
    assert lock_holder(storage) is not None


def test_another_hosts_lock_is_taken_over_once_its_heartbeat_is_old_and_does_not_change(
    storage: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    _place(storage, host="node7", pid=os.getpid(), heartbeat=time.time() - 61)
    lock = OutputLock(storage, watch_s=0.3)
    (note,) = lock.acquire()
    assert "on node7" in note
    assert "watching its heartbeat for" in caplog.text
    lock.release()


@pytest.mark.parametrize("clock", ["+2h", "-2h"])
@pytest.mark.parametrize("namespace", ["own", "other"])
def test_a_living_driver_keeps_its_lock_whatever_the_clock_and_the_namespace(
    storage: LocalStorage, driver: "subprocess.Popen[str]", clock: str, namespace: str
) -> None:
    """The second driver has a clock that is hours off, and where it can sees no process of the first."""
    if namespace == "other" and os.geteuid() != 0:
        # The kernel's rule; `.ci/run` runs as root.
        pytest.skip("only root makes PID namespaces")
    if shutil.which("faketime") is None:
        # A Debian package, which `.ci/run` installs.
        pytest.skip("faketime is not installed")
    command = ["faketime", "-f", clock, sys.executable, "-c", SECOND, storage.uri]
    if namespace == "other":
        command = ["unshare", "--pid", "--fork", "--mount-proc", *command]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"in use by process {driver.pid} on " in found.stdout, found.stdout + found.stderr
    assert ("still renews its lock" in found.stdout) == (namespace == "other")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"took over the lock of process {driver.pid}" in found.stdout, found.stdout + found.stderr


def test_a_lock_of_an_older_version_is_read(storage: LocalStorage, driver: "subprocess.Popen[str]") -> None:
    """Without ticks and namespace the start in seconds tells a living driver from a dead one."""
    old = json.loads(storage.read_bytes(".lock"))
    for name in ("pid_namespace", "start_ticks", "beats"):
        del old[name]
    driver.send_signal(signal.SIGSTOP)  # so that it writes no new one
    storage.write_bytes(".lock", encode_json(old))
    with pytest.raises(OutputError, match=f"in use by process {driver.pid} on"):
        OutputLock(storage).acquire()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    lock = OutputLock(storage)
    (note,) = lock.acquire()
    assert f"took over the lock of process {driver.pid}" in note
    lock.release()


def test_a_machine_that_was_booted_again_is_another_host(storage: LocalStorage) -> None:
    _place(storage, boot_id="an earlier boot", heartbeat=time.time() - 5)
    with pytest.raises(OutputError, match="last seen"):
        OutputLock(storage).acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_damaged_lock_file_stops_nobody_and_is_said(storage: LocalStorage, content: bytes) -> None:
    storage.write_bytes(".lock", content)
    lock = OutputLock(storage)
    (note,) = lock.acquire()
    assert "damaged" in note
    lock.release()


def test_the_heartbeat_is_renewed_while_the_driver_is_busy(storage: LocalStorage) -> None:
    with OutputLock(storage, heartbeat_s=0.02):
        first = lock_holder(storage)
        assert first is not None
        deadline = time.monotonic() + 10
        now: LockHolder | None = first
        while time.monotonic() < deadline and now is not None and now.heartbeat == first.heartbeat:
            time.sleep(0.01)
            now = lock_holder(storage)
        assert now is not None
        assert now.token == first.token
        assert now.heartbeat > first.heartbeat


def test_a_driver_whose_lock_was_taken_over_notices_and_leaves_the_new_one_alone(
    storage: LocalStorage,
) -> None:
    lock = OutputLock(storage, heartbeat_s=60)
    lock.acquire()
    other = _place(storage, host="node7")
    lock.refresh()
    with pytest.raises(OutputError, match=r"taken over by process .* on node7"):
        lock.check()
    lock.release()
    assert lock_holder(storage) == other


def test_of_many_drivers_that_find_a_dead_ones_lock_exactly_one_goes_on(storage: LocalStorage) -> None:
    for _ in range(10):
        _place(storage, start_ticks=1)
        barrier = threading.Barrier(6)
        taken: list[OutputLock] = []
        refused: list[OutputError] = []

        def contend(
            barrier: threading.Barrier = barrier,
            taken: list[OutputLock] = taken,
            refused: list[OutputError] = refused,
        ) -> None:
            lock = OutputLock(storage)
            barrier.wait()
            try:
                lock.acquire()
            except OutputError as error:
                refused.append(error)
            else:
                taken.append(lock)

        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(taken), len(refused)) == (1, 5)
        taken[0].check()
        taken[0].release()
        assert storage.list() == []


def test_a_lock_works_on_a_remote_storage() -> None:
    storage = FsspecStorage(f"memory://{uuid.uuid4().hex}")
    with OutputLock(storage), pytest.raises(OutputError, match="in use by"):
        OutputLock(storage).acquire()
    assert storage.list() == []


def test_a_heartbeat_does_not_bring_back_a_directory_that_was_removed(tmp_path: Path) -> None:
    """As `merge` removes a shard's, whose lock it holds."""
    lock = OutputLock(LocalStorage(tmp_path / "shard"))
    lock.acquire()
    shutil.rmtree(tmp_path / "shard")
    lock.refresh()
    lock.release()
    assert not (tmp_path / "shard").exists()
