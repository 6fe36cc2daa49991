"""Files are written whole or not at all, and a storage that cannot be written says so in words."""

import errno
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from records_kit import files_below

from mllm_shapx.errors import OutputError, StorageError
from mllm_shapx.records.local_storage import TEMP_PREFIX
from mllm_shapx.records.storage import (
    FsspecStorage,
    LocalStorage,
    Storage,
    join_uri,
    open_storage,
    read_json,
    write_json,
)


@pytest.fixture(params=["local", "fsspec-file", "fsspec-memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A storage of each kind, whose directory does not exist yet."""
    if request.param == "local":
        yield LocalStorage(tmp_path / "a" / "set")
    elif request.param == "fsspec-file":
        yield FsspecStorage(f"file://{tmp_path}/a/set")
    else:
        memory = FsspecStorage(f"memory://{uuid.uuid4().hex}/set")
        yield memory
        memory.remove("")


def test_what_is_written_is_read_back_and_folders_appear_by_themselves(storage: Storage) -> None:
    storage.write_bytes("run/samples/x.json", b"one")
    storage.write_bytes("run/samples/x.json", b"two")
    storage.write_bytes("run/samples/y.json", b"")
    assert storage.read_bytes("run/samples/x.json") == b"two"
    assert storage.list("run/samples") == ["x.json", "y.json"]
    assert storage.list("run") == ["samples"]
    assert storage.list("nowhere") == []
    assert storage.exists("run/samples/y.json")
    assert storage.exists("run")
    assert not storage.exists("run/other")
    assert storage.size("run/samples/x.json") == 3


def test_a_file_that_is_not_there_is_told_from_one_that_cannot_be_read(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("no/such.json")


def test_many_files_are_read_in_the_order_asked_for_and_missing_ones_are_named(storage: Storage) -> None:
    paths = [f"s/{number:04d}" for number in range(700)]
    for path in paths[::7]:
        storage.write_bytes(path, path.encode())
    found = list(storage.read_many(paths))
    assert [path for path, _ in found] == paths
    for number, (path, content) in enumerate(found):
        if number % 7 == 0:
            assert content == path.encode()
        else:
            assert isinstance(content, FileNotFoundError)


def test_files_and_folders_are_moved_and_removed(storage: Storage) -> None:
    storage.write_bytes("run/samples/x.json", b"x")
    storage.write_bytes("run/spec.json", b"s")
    storage.move("run/spec.json", "old/run/spec.json")
    storage.move("run/samples", "old/run/samples")
    assert storage.read_bytes("old/run/samples/x.json") == b"x"
    assert not storage.exists("run/spec.json")
    assert not storage.exists("run/samples/x.json")
    storage.remove("old/run/samples")
    storage.remove("old/run/spec.json")
    storage.remove("never/was")
    assert storage.list("old/run") == []


def test_a_file_is_created_by_one_of_many_only(storage: Storage) -> None:
    assert storage.create_exclusive("lock", b"first")
    assert not storage.create_exclusive("lock", b"second")
    assert storage.read_bytes("lock") == b"first"
    assert storage.list() == ["lock"]


def test_threads_that_create_the_same_file_agree_on_one_winner(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    barrier = threading.Barrier(8)
    won: list[int] = []

    def contend(number: int) -> None:
        barrier.wait()
        if storage.create_exclusive("lock", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes("lock") == str(won[0]).encode()
    assert storage.list() == ["lock"]


def test_probing_leaves_no_trace_whether_or_not_the_directory_exists(
    storage: Storage, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    storage.probe()
    assert sorted(tmp_path.rglob("*")) == before
    assert not storage.exists("")
    storage.write_bytes("x", b"x")
    storage.probe()
    assert storage.list() == ["x"]


@pytest.mark.parametrize("below", ["", "set", "a/b/set"])
def test_a_file_where_the_directory_should_be_is_refused_before_anything_is_written(
    tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("mine")
    root = tmp_path / "file" / below
    with pytest.raises(OutputError, match=r"cannot be written.*a file stands where a directory is needed"):
        LocalStorage(root).probe()
    assert files_below(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that nobody can write to")
def test_a_directory_that_cannot_be_written_is_refused_with_the_reason() -> None:
    with pytest.raises(OutputError, match="/proc/nothing/set cannot be written"):
        LocalStorage("/proc/nothing/set").probe()


def test_a_directory_without_write_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # Root passes every permission; the test before this one holds the refusal for root too.
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="permission is denied: make the directory writable"):
            LocalStorage(tmp_path / "set").probe()
    finally:
        tmp_path.chmod(0o700)


def test_an_unknown_protocol_is_refused_in_words() -> None:
    with pytest.raises(OutputError, match="install the fsspec backend"):
        open_storage("nosuchprotocol://bucket/set")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full: free space, then run again with --resume"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "fails"),
        (errno.EACCES, "permission"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_is_reported_with_path_and_remedy_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str, call: str
) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("run/x.json", b"old")

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=remedy) as caught:
            storage.write_bytes("run/x.json", b"new")
    assert str(tmp_path / "run" / "x.json") in str(caught.value)
    assert files_below(tmp_path) == {"run/x.json": b"old"}
    storage.write_bytes("run/x.json", b"new")
    assert storage.read_bytes("run/x.json") == b"new"


def test_a_disk_that_is_really_full_is_reported_and_nothing_half_written_stays(tmp_path: Path) -> None:
    """A limit on the file size stands in for the full disk: the kernel itself cuts the write short."""
    import resource
    import signal

    storage = LocalStorage(tmp_path)
    storage.write_bytes("x", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            storage.write_bytes("x", b"n" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_below(tmp_path) == {"x": b"old"}


def test_a_file_system_that_cannot_flush_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    LocalStorage(tmp_path).write_bytes("run/x.json", b"x")
    assert files_below(tmp_path) == {"run/x.json": b"x"}


def test_a_file_system_without_hard_links_still_gives_one_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(tmp_path)
    assert storage.create_exclusive("lock", b"first")
    assert not storage.create_exclusive("lock", b"second")
    assert files_below(tmp_path) == {"lock": b"first"}


def test_a_reader_never_sees_half_a_file_while_it_is_replaced(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    contents = [letter * 200_000 for letter in (b"a", b"b")]
    storage.write_bytes("x", contents[0])
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write_bytes("x", content)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        assert all(storage.read_bytes("x") in contents for _ in range(200))
    finally:
        stop.set()
        writer.join()


def test_json_is_indented_ends_with_a_newline_and_refuses_nan(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_json(storage, "x.json", {"key": ["ż"]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "key": [\n    "ż"\n  ]\n}\n'
    assert read_json(storage, "x.json") == {"key": ["ż"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(storage, "x.json", {"key": float("nan")})


@pytest.mark.parametrize("content", [b"", b" \n", b"\0\0\0", b'{"a"', b"\xff\xfe", b"[" * 100_000])
def test_bytes_that_are_no_json_are_one_kind_of_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="it is "):
        read_json(LocalStorage(tmp_path), "x.json")


def test_temporary_files_are_known_by_their_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    replace = os.replace

    def spy(source: str, target: str) -> None:
        seen.append(Path(source).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    LocalStorage(tmp_path).write_bytes("x", b"x")
    assert len(seen) == 1
    assert seen[0].startswith(TEMP_PREFIX)


@pytest.mark.parametrize(
    ("root", "parts", "joined"),
    [("out", ("set",), "out/set"), ("/", ("set",), "/set"), ("s3://b/", ("set", "run"), "s3://b/set/run")],
)
def test_paths_and_uris_are_joined_alike(root: str, parts: tuple[str, ...], joined: str) -> None:
    assert join_uri(root, *parts) == joined


def test_a_file_uri_gets_the_guarantees_of_a_local_directory(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/set")
    assert isinstance(storage, LocalStorage)
    assert storage.uri == f"{tmp_path}/set"


def test_files_that_are_waited_for_are_read_side_by_side_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow open stands in for a network file system."""
    storage = LocalStorage(tmp_path)
    paths = [f"{number:04d}" for number in range(1500)]
    for path in paths:
        (tmp_path / path).write_text(path)
    slow_open, guard = os.open, threading.Lock()
    at_once = [0, 0]

    def wait_and_open(path: str, flags: int) -> int:
        with guard:
            at_once[0] += 1
            at_once[1] = max(at_once)
        time.sleep(0.0005)
        with guard:
            at_once[0] -= 1
        return slow_open(path, flags)

    monkeypatch.setattr(os, "open", wait_and_open)
    found = list(storage.read_many(paths))
    assert at_once[1] > 1
    assert found == [(path, path.encode()) for path in paths]


_ON_A_SMALL_DISK = """
import subprocess, sys
from mllm_shapx.errors import OutputError, StorageError
from mllm_shapx.records.storage import LocalStorage

root = sys.argv[1]
storage = LocalStorage(root + "/set")
storage.probe()
storage.write_bytes("run/x", b"old")
storage.write_bytes("run/ballast", b"b" * 40_000)
try:
    storage.write_bytes("run/x", b"n" * 60_000)
except StorageError as error:
    print(error)
print(storage.list("run"), storage.read_bytes("run/x"))
storage.remove("run/ballast")
storage.write_bytes("run/x", b"n" * 40_000)
print(storage.size("run/x"))
try:
    with open(root + "/filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"f" * 512)
except OSError:
    pass
try:
    storage.probe()
except StorageError as error:
    print(error.exit_code, error)
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
try:
    storage.write_bytes("run/x", b"new")
except StorageError as error:
    print(error)
try:
    storage.probe()
except OutputError as error:
    print(error)
"""


def test_a_disk_that_fills_up_and_one_that_turns_read_only_are_named_and_keep_what_was_written(
    tmp_path: Path,
) -> None:
    """On a real file system of 64 kB, in a mount namespace of its own."""
    mount = 'mount -t tmpfs -o size=64k none "$1"'
    unshare = ["unshare", "-rm", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount, "sh", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        # Where user namespaces are forbidden; test_signals.py fills a disk without mounting one.
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run(
        [
            *unshare,
            f'{mount} && exec "$2" -c "$3" "$1"',
            "sh",
            str(tmp_path),
            sys.executable,
            _ON_A_SMALL_DISK,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    full, kept, size, still_full, read_only, probed = done.stdout.splitlines()
    place = f"{tmp_path}/set"
    assert full.startswith(
        f"cannot write {place}/run/x: No space left on device: the disk is full: free space"
    )
    assert kept == "['ballast', 'x'] b'old'"
    assert size == "40000"
    assert still_full.startswith(f"1 the output directory {place} cannot be written: No space left on device")
    assert read_only.startswith(f"cannot write {place}/run/x: Read-only file system")
    assert probed.startswith(f"the output directory {place} cannot be written: Read-only file system")
