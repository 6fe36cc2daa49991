"""Where bytes go: a local directory or any fsspec URI, written so that a reader never sees half a file."""

import contextlib
import errno
import json
import os
import secrets
import stat
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from mllm_shapx.errors import MisplacedError, OutputError, StorageError

TEMP_PREFIX = ".tmp-"
"""Files of this prefix are unfinished writes; what is left of them after a crash may be removed."""

_DEEPEST = 64
"""Levels of objects and lists in a file that is read; deeper ones exhaust the stack of what compares them."""

_READ_THREADS = 8
_READ_CHUNK = 256
_SLOW_READ_S = 0.0002
"""From here on a file is waited for, and reading in threads is faster; below, threads only get in the way."""
# File systems that cannot flush a folder say so with these; the rename itself is still atomic there.
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
"""The call is right, and the same call works later: the study fails as it would in the middle."""

_NO_FILE = {errno.ELOOP: "it is a link that leads to itself", errno.ENXIO: "it is a socket or a device"}


class NoFileError(IsADirectoryError):
    """Something that is no file stands where one belongs; its `strerror` says what."""


class Storage(Protocol):
    """A directory of files. Paths are relative POSIX strings; folders appear when something is written.

    All methods but `probe` raise StorageError on an I/O failure, naming the path, the reason and the remedy.
    """

    @property
    def uri(self) -> str:
        """Return what the user would call this directory: a path or a URI."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Replace the file as a whole; after a crash it holds the old bytes or the new ones."""

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create the file with its content unless it exists; return whether it was created."""

    def read_bytes(self, path: str) -> bytes:
        """Return the file's bytes.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When a folder, a pipe or a device stands there.
        """

    def read_many(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Yield every path, in order, with its bytes or with what kept it from being read."""

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names directly below a folder; none when it does not exist."""

    def exists(self, path: str) -> bool:
        """Return whether a file or folder is there."""

    def size(self, path: str) -> int:
        """Return the file's length in bytes.

        Raises:
            FileNotFoundError: When there is no such file.
        """

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder, making the folder of `target`."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens when it is not there."""

    def probe(self) -> None:
        """Check that files can be written here, leaving nothing behind.

        Raises:
            OutputError: When they cannot.
        """

    def locate(self, path: str) -> str:
        """Return the full path or URI of a file, for messages."""


def open_storage(root: str) -> Storage:
    """Return the storage of a directory path or of an fsspec URI (anything with `://`)."""
    if root.startswith("file://"):
        return LocalStorage(root.removeprefix("file://"))
    if "://" in root:
        return FsspecStorage(root)
    return LocalStorage(root)


def join_uri(root: str, *parts: str) -> str:
    """Return the path or URI of something below `root`."""
    base = root if root.endswith("://") else root.rstrip("/") + "/"
    return base + "/".join(parts)


def encode_json(data: Any) -> bytes:
    """Return JSON as it is written to files: indented by 2, ending with a newline, no NaN."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair, which broken text may hold, is no character in a file.
    return text.encode(errors="replace")


def write_json(storage: Storage, path: str, data: Any) -> None:
    """Write JSON data as a file."""
    storage.write_bytes(path, encode_json(data))


def read_json(storage: Storage, path: str) -> Any:
    """Return a JSON file's data.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the content is not JSON.
    """
    return decode_json(storage.read_bytes(path))


def decode_json(data: bytes) -> Any:
    """Return the data of JSON bytes.

    Raises:
        ValueError: When they are not JSON; the message says how.
    """
    if not data.strip(b" \t\r\n\0"):
        raise ValueError("it is empty")
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    # Few files have as many brackets, and to count them costs nothing beside parsing.
    if data.count(b"[") + data.count(b"{") > _DEEPEST and _is_deep(content):
        raise ValueError("it is nested too deeply")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


class LocalStorage:
    """A directory of this machine or of a network file system that is mounted here."""

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.abspath(os.path.expanduser(root))  # noqa: PTH100, PTH111 -- keeps symlinks as written

    @property
    def uri(self) -> str:
        """Return the absolute path."""
        return self._root

    def __repr__(self) -> str:
        return f"LocalStorage({self._root!r})"

    def locate(self, path: str) -> str:
        """Return the absolute path of a file."""
        return os.path.join(self._root, path) if path else self._root  # noqa: PTH118 -- hot path

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a temporary file beside the target, flush it to disk, rename it, flush the folder."""
        target = self.locate(path)
        folder = os.path.dirname(target)  # noqa: PTH120 -- hot path
        with _translated("write", target):
            temp = _write_temp(folder, data)
            try:
                os.replace(temp, target)  # noqa: PTH105 -- hot path
            except OSError:
                _discard(temp)
                raise
            _sync_folder(folder)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create by linking a finished temporary file: atomic on network file systems too."""
        target = self.locate(path)
        folder = os.path.dirname(target)  # noqa: PTH120
        with _translated("create", target):
            temp = _write_temp(folder, data)
            try:
                created = _link_exclusive(temp, target, data)
            finally:
                _discard(temp)
            _sync_folder(folder)
        return created

    def read_bytes(self, path: str) -> bytes:
        """Return the file's bytes."""
        target = self.locate(path)
        with _translated("read", target):
            try:
                return _read(target)
            except NoFileError as error:
                # For a reader it is a damaged file like any other.
                raise ValueError(error.strerror) from error

    def read_many(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Read one after the other; ahead in threads where files are waited for, as on a network."""
        chunks = [paths[start : start + _READ_CHUNK] for start in range(0, len(paths), _READ_CHUNK)]
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
            # A few chunks ahead of the reader, so that memory does not grow with the number of files.
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
                # One bad file must not cost the others.
                contents.append(error)
        return contents

    def list(self, path: str = "") -> list[str]:
        """Return the names in a folder."""
        target = self.locate(path)
        with _translated("list", target):
            try:
                return sorted(os.listdir(target))  # noqa: PTH208
            except FileNotFoundError:
                return []

    def exists(self, path: str) -> bool:
        """Return whether the path is there, a dangling link included."""
        return os.path.lexists(self.locate(path))

    def size(self, path: str) -> int:
        """Return the file's length in bytes."""
        target = self.locate(path)
        with _translated("look at", target):
            return os.stat(target).st_size  # noqa: PTH116

    def move(self, source: str, target: str) -> None:
        """Rename within the directory."""
        full_source, full_target = self.locate(source), self.locate(target)
        folder = os.path.dirname(full_target)  # noqa: PTH120
        with _translated("move a file to", full_target):
            _make_folder(folder)
            os.replace(full_source, full_target)  # noqa: PTH105
            _sync_folder(folder)

    def remove(self, path: str) -> None:
        """Remove a file or a folder."""
        import shutil

        target = self.locate(path)
        with _translated("remove", target), contextlib.suppress(FileNotFoundError):
            if os.path.isdir(target) and not os.path.islink(target):  # noqa: PTH112, PTH114
                shutil.rmtree(target)
            else:
                os.unlink(target)  # noqa: PTH108

    def probe(self) -> None:
        """Make and remove a folder in the directory, or where its first missing folder would be made."""
        folder = Path(self._root)
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        trial = folder / f"{TEMP_PREFIX}{secrets.token_hex(8)}"
        try:
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))
            trial.mkdir()
            try:
                _probe_file(trial / "probe")
            finally:
                trial.rmdir()
        except OSError as error:
            kind = StorageError if error.errno in _FAILING_DISK else OutputError
            raise kind(
                f"the output directory {self._root} cannot be written: {_reason(error)} ({folder}); "
                "or choose another output_root"
            ) from error


class FsspecStorage:
    """A directory behind any fsspec URI: an object store, or a remote file system.

    Object stores publish an object as a whole when its upload ends. File systems that have a rename of their
    own get a temporary file and the rename.
    """

    def __init__(self, uri: str) -> None:
        import fsspec

        self._uri = uri.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise OutputError(
                f"output_root {uri!r} cannot be used: {error}; install the fsspec backend of that protocol, "
                "or use a directory"
            ) from error
        self._root = self._root.rstrip("/")
        self._renames = type(self._fs).mv is not fsspec.AbstractFileSystem.mv

    @property
    def uri(self) -> str:
        """Return the URI."""
        return self._uri

    def __repr__(self) -> str:
        return f"FsspecStorage({self._uri!r})"

    def locate(self, path: str) -> str:
        """Return the URI of a file."""
        return f"{self._uri}/{path}" if path else self._uri

    def write_bytes(self, path: str, data: bytes) -> None:
        """Upload whole, or write beside and rename where the file system can."""
        target = self._full(path)
        with self._translated("write", self.locate(path)):
            if not self._renames:
                self._put(target, data)
                return
            folder, _, _ = target.rpartition("/")
            temp = f"{folder}/{TEMP_PREFIX}{uuid.uuid4().hex}"
            try:
                self._put(temp, data)
                self._fs.mv(temp, target)
            except Exception:
                with contextlib.suppress(Exception):  # the failure of the write itself is the one to report
                    self._fs.rm_file(temp)
                raise

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create unless it exists; atomic where the backend offers it, else checked just before."""
        target = self._full(path)
        with self._translated("create", self.locate(path)):
            if self._fs.exists(target):
                return False
            self._make_parent(target)
            try:
                self._fs.pipe_file(target, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):
                # Backends that do not know `mode` say so in these ways.
                self._put(target, data)
            return bool(self._fs.cat_file(target) == data)

    def read_bytes(self, path: str) -> bytes:
        """Return the file's bytes."""
        with self._translated("read", self.locate(path)):
            return bytes(self._fs.cat_file(self._full(path)))

    def read_many(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Fetch chunk by chunk; backends that can, fetch a chunk's files at once."""
        for start in range(0, len(paths), _READ_CHUNK):
            chunk = paths[start : start + _READ_CHUNK]
            with self._translated("read", self._uri):
                found = self._fs.cat([self._full(path) for path in chunk], on_error="return")
            if isinstance(found, bytes):
                found = {self._full(chunk[0]): found}
            for path in chunk:
                content = found.get(self._full(path), FileNotFoundError(path))
                if isinstance(content, bytes | OSError):
                    yield path, content
                else:
                    yield path, OSError(errno.EIO, str(content), path)

    def list(self, path: str = "") -> list[str]:
        """Return the names below a folder."""
        target = self._full(path)
        with self._translated("list", self.locate(path)):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(target, detail=False)
            except FileNotFoundError:
                return []
        paths = {str(name).rstrip("/") for name in found} - {target}
        return sorted(path.rpartition("/")[2] for path in paths)

    def exists(self, path: str) -> bool:
        """Return whether a file or folder is there."""
        with self._translated("look at", self.locate(path)):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._full(path)))

    def size(self, path: str) -> int:
        """Return the file's length in bytes."""
        with self._translated("look at", self.locate(path)):
            return int(self._fs.size(self._full(path)))

    def move(self, source: str, target: str) -> None:
        """Rename, or copy and remove where the backend has no rename."""
        full_source, full_target = self._full(source), self._full(target)
        with self._translated("move a file to", self.locate(target)):
            self._make_parent(full_target)
            self._fs.mv(full_source, full_target, recursive=bool(self._fs.isdir(full_source)))

    def remove(self, path: str) -> None:
        """Remove a file or a folder."""
        with self._translated("remove", self.locate(path)), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    def probe(self) -> None:
        """Write and remove an object below the URI, and the folders that this made."""
        missing = self._missing_folders()
        try:
            name = f"{TEMP_PREFIX}{uuid.uuid4().hex}"
            self.write_bytes(name, b"probe")
            self.remove(name)
        except StorageError as error:
            raise OutputError(
                f"the output directory {self._uri} cannot be written: {error.__cause__}; "
                "check its permissions and credentials, or choose another output_root"
            ) from error
        finally:
            for folder in missing:
                with contextlib.suppress(Exception):  # object stores have no folders to remove
                    self._fs.rmdir(folder)

    def _missing_folders(self) -> tuple[str, ...]:
        """Return the folders of the root that do not exist yet, the deepest first."""
        missing, folder = [], self._root
        while folder and folder != "/" and not self._fs.exists(folder):
            missing.append(folder)
            folder = folder.rpartition("/")[0]
        return tuple(missing)

    @staticmethod
    def _translated(action: str, place: str) -> contextlib.AbstractContextManager[None]:
        # Backends raise types of their own beside OSError.
        return _translated(action, place, Exception)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _make_parent(self, target: str) -> None:
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)

    def _put(self, target: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(target, data)
        except FileNotFoundError:
            self._make_parent(target)
            self._fs.pipe_file(target, data)


def unreadable(place: str, error: OSError) -> StorageError:
    """Return the error for a file that is there and cannot be read, such as one yielded by `read_many`."""
    return StorageError(f"cannot read {place}: {_reason(error)}, then run again with --resume")


@contextlib.contextmanager
def _translated(action: str, place: str, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Turn an I/O failure into a StorageError; a file that is simply not there stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except kinds as error:
        message = f"cannot {action} {place}: {_reason(error)}, then run again with --resume"
        is_misplaced = isinstance(error, OSError) and error.errno in {errno.ENOTDIR, errno.ELOOP}
        raise (MisplacedError if is_misplaced else StorageError)(message) from error


def _reason(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    remedy = _REMEDIES.get(number, "check the storage") if number is not None else "check the storage"
    return f"{text}: {remedy}"


def _read(path: str) -> bytes:
    # os.open costs half of what open() does, which matters for 100,000 samples.
    # Without O_NONBLOCK a pipe in the place of a file would be waited for.
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


def _write_temp(folder: str, data: bytes) -> str:
    """Return the path of a new temporary file in `folder` with `data` on disk; nothing stays on failure."""
    temp = os.path.join(folder, f"{TEMP_PREFIX}{secrets.token_hex(8)}")  # noqa: PTH118
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        handle = os.open(temp, flags, 0o666)
    except FileNotFoundError:
        _make_folder(folder)
        handle = os.open(temp, flags, 0o666)
    try:
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        _discard(temp)
        raise
    return temp


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _link_exclusive(temp: str, target: str, data: bytes) -> bool:
    try:
        os.link(temp, target)
    except FileExistsError:
        # A network file system may have made the link and lost its answer.
        return os.stat(temp).st_nlink == 2  # noqa: PLR2004, PTH116
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _create_plain(target, data)
    return True


def _create_plain(target: str, data: bytes) -> bool:
    """Create exclusively on a file system without hard links; a reader may see it empty for a moment."""
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        _write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
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


def _probe_file(path: Path) -> None:
    try:
        path.write_bytes(b"probe")
    finally:
        path.unlink(missing_ok=True)


def _discard(temp: str) -> None:
    with contextlib.suppress(OSError):  # the failure that led here is the one to report
        os.unlink(temp)  # noqa: PTH108
