"""Files of a local or mounted directory, written so that a reader never sees half a file."""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mllm_shapx.errors import MisplacedError, OutputError, StorageError

TEMP_PREFIX = ".tmp-"
"""Prefix of unfinished writes; such files may be removed after a crash."""

_READ_THREADS = 8
READ_CHUNK = 256
_SLOW_READ_S = 0.0002
"""Seconds per file from which reading in threads is faster."""
# Errors of file systems that cannot flush a folder; a rename is still atomic there.
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK})

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space",
    errno.EDQUOT: "your disk quota is used up: free space",
    errno.EROFS: "the file system is read-only: make it writable",
    errno.EACCES: "permission is denied: make the directory writable for this user",
    errno.EPERM: "permission is denied: make the directory writable for this user",
    errno.EIO: "the disk or the network file system fails: check it",
    errno.ENOTDIR: "a file stands where a directory is needed: move it away",
    errno.ELOOP: "a link leads to itself: remove it",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter output_root or experiment_set_id",
}

_FAILING_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""The call is valid and may succeed later, so this is not bad input (exit code 1, not 2)."""

_NO_FILE = {errno.ELOOP: "it is a link that leads to itself", errno.ENXIO: "it is a socket or a device"}


class NoFileError(IsADirectoryError):
    """The path is not a regular file; `strerror` names its kind."""


class LocalStorage:
    """A directory on this machine or on a mounted network file system."""

    def __init__(self, root: str | Path) -> None:
        self.uri = os.path.abspath(os.path.expanduser(root))  # noqa: PTH100, PTH111 -- keeps symlinks as written

    def __repr__(self) -> str:
        return f"LocalStorage({self.uri!r})"

    def locate(self, path: str) -> str:
        """Return the absolute path of a file."""
        return os.path.join(self.uri, path) if path else self.uri  # noqa: PTH118 -- hot path

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a temporary file beside the target, flush it, rename it, flush the folder."""
        target = self.locate(path)
        folder = os.path.dirname(target)  # noqa: PTH120 -- hot path
        with translated("write", target):
            with _temporary(folder, data) as temp:
                os.replace(temp, target)  # noqa: PTH105 -- hot path
            _sync_folder(folder)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create by hard-linking a finished temporary file: atomic on network file systems too."""
        target = self.locate(path)
        folder = os.path.dirname(target)  # noqa: PTH120
        with translated("create", target):
            with _temporary(folder, data) as temp:
                created = _link_exclusive(temp, target, data)
                with contextlib.suppress(OSError):  # the file is there, whatever becomes of this one
                    os.unlink(temp)  # noqa: PTH108
            _sync_folder(folder)
        return created

    def read_bytes(self, path: str) -> bytes:
        """Return the file's bytes."""
        target = self.locate(path)
        with translated("read", target):
            try:
                return _read(target)
            except NoFileError as error:
                # Readers treat this like any damaged file.
                raise ValueError(error.strerror) from error

    def read_many(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Read one by one; on slow file systems, read ahead in threads."""
        chunks = [paths[start : start + READ_CHUNK] for start in range(0, len(paths), READ_CHUNK)]
        waits = False
        for index, chunk in enumerate(chunks):
            if waits:
                yield from self._read_ahead(chunks[index:])
                return
            start = time.perf_counter()
            contents = self._read_chunk(chunk)
            waits = time.perf_counter() - start > _SLOW_READ_S * len(chunk)
            yield from zip(chunk, contents, strict=True)

    def _read_ahead(self, chunks: Sequence[Sequence[str]]) -> Iterator[tuple[str, bytes | OSError]]:
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read") as pool:
            # Read only a few chunks ahead: memory must not grow with the number of files.
            pending = deque(pool.submit(self._read_chunk, chunk) for chunk in chunks[:_READ_THREADS])
            for index, chunk in enumerate(chunks):
                contents = pending.popleft().result()
                ahead = index + _READ_THREADS
                if ahead < len(chunks):
                    pending.append(pool.submit(self._read_chunk, chunks[ahead]))
                yield from zip(chunk, contents, strict=True)

    def _read_chunk(self, paths: Sequence[str]) -> list[bytes | OSError]:
        contents: list[bytes | OSError] = []
        for path in paths:
            try:
                contents.append(_read(self.locate(path)))
            except OSError as error:
                # One bad file must not stop the others.
                contents.append(error)
        return contents

    def list(self, path: str = "") -> list[str]:
        """Return the names in a folder."""
        target = self.locate(path)
        with translated("list", target):
            try:
                return sorted(os.listdir(target))  # noqa: PTH208
            except FileNotFoundError:
                return []

    def exists(self, path: str) -> bool:
        """Return whether the path exists; a dangling link counts."""
        return os.path.lexists(self.locate(path))

    def size(self, path: str) -> int:
        """Return the file's length in bytes."""
        target = self.locate(path)
        with translated("look at", target):
            return os.stat(target).st_size  # noqa: PTH116

    def move(self, source: str, target: str) -> None:
        """Rename within the directory."""
        full_source, full_target = self.locate(source), self.locate(target)
        folder = os.path.dirname(full_target)  # noqa: PTH120
        with translated("move a file to", full_target):
            _make_folder(folder)
            os.replace(full_source, full_target)  # noqa: PTH105
            _sync_folder(folder)

    def remove(self, path: str) -> None:
        """Remove a file or a folder."""
        import shutil

        target = self.locate(path)
        with translated("remove", target), contextlib.suppress(FileNotFoundError):
            if os.path.isdir(target) and not os.path.islink(target):  # noqa: PTH112, PTH114
                shutil.rmtree(target)
            else:
                os.unlink(target)  # noqa: PTH108

    def probe(self) -> None:
        """Make and remove a folder in the directory, or in its nearest existing parent."""
        folder = Path(self.uri)
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        try:
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))
            with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=folder) as trial:
                Path(trial, "probe").write_bytes(b"probe")
        except OSError as error:
            kind = StorageError if error.errno in _FAILING_DISK else OutputError
            raise kind(
                f"the output directory {self.uri} cannot be written: {_reason(error)} ({folder}); "
                "or choose another output_root"
            ) from error


def unreadable(place: str, error: OSError) -> StorageError:
    """Return the error for an existing, unreadable file, such as one yielded by `read_many`."""
    return StorageError(f"cannot read {place}: {_reason(error)}, then run again with --resume")


@contextlib.contextmanager
def translated(action: str, place: str, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Turn an I/O failure into a StorageError; a missing file stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except kinds as error:
        message = f"cannot {action} {place}: {_reason(error)}, then run again with --resume"
        is_misplaced = isinstance(error, OSError) and error.errno in {errno.ENOTDIR, errno.ELOOP}
        raise (MisplacedError if is_misplaced else StorageError)(message) from error


def _reason(error: Exception) -> str:
    number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
    remedy = _REMEDIES.get(number or 0, "check the storage")
    return f"{text or str(error) or type(error).__name__}: {remedy}"


def _read(path: str) -> bytes:
    # os.open takes half the time of open(), which matters for 100,000 samples.
    # O_NONBLOCK: opening a pipe must not block.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise NoFileError(error.errno, _NO_FILE[error.errno], path) from error
        raise
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            what = "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device"
            raise NoFileError(errno.EISDIR, what, path)
        parts = []
        while part := os.read(handle, 1 << 18):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(folder: str, data: bytes) -> Iterator[str]:
    """Write `data` to a temporary file in `folder` and yield its path; after an error, remove it."""
    temp = os.path.join(folder, f"{TEMP_PREFIX}{secrets.token_hex(8)}")  # noqa: PTH118
    try:
        try:
            _write_new(temp, data)
        except FileNotFoundError:
            _make_folder(folder)
            _write_new(temp, data)
        yield temp
    except BaseException:
        with contextlib.suppress(OSError):  # report the original failure
            os.unlink(temp)  # noqa: PTH108
        raise


def _write_new(path: str, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_exclusive(temp: str, target: str, data: bytes) -> bool:
    try:
        os.link(temp, target)
    except FileExistsError:
        # A network file system may create the link and lose the reply.
        return os.stat(temp).st_nlink == 2  # noqa: PLR2004, PTH116
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    else:
        return True
    # Without hard links; a reader may briefly see an empty file.
    try:
        _write_new(target, data)
    except FileExistsError:
        return False
    return True


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):  # noqa: PTH112
        return
    parent = os.path.dirname(folder)  # noqa: PTH120
    if parent != folder:
        _make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)  # noqa: PTH102
        _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    """Flush a folder's entries, so that a rename survives a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(handle)
