"""Files behind an fsspec URI: an object store, or a remote file system."""

import contextlib
import errno
import functools
import uuid
from collections.abc import Iterator, Sequence

from mllm_shapx.errors import OutputError, StorageError
from mllm_shapx.records.local_storage import READ_CHUNK, TEMP_PREFIX, translated

# Backends raise their own types besides OSError.
_translated = functools.partial(translated, kinds=Exception)


class FsspecStorage:
    """A directory behind any fsspec URI: an object store, or a remote file system.

    Object stores publish an object as a whole when its upload ends. On file systems with a rename, a
    temporary file is written and renamed.
    """

    def __init__(self, uri: str) -> None:
        import fsspec

        self.uri = uri.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise OutputError(
                f"output_root {uri!r} cannot be used: {error}; install the fsspec backend of that protocol, "
                "or use a directory"
            ) from error
        self._root = self._root.rstrip("/")
        self._renames = type(self._fs).mv is not fsspec.AbstractFileSystem.mv

    def __repr__(self) -> str:
        return f"FsspecStorage({self.uri!r})"

    def locate(self, path: str) -> str:
        """Return the URI of a file."""
        return f"{self.uri}/{path}" if path else self.uri

    def write_bytes(self, path: str, data: bytes) -> None:
        """Upload the whole object; with a rename, write a temporary file and rename it."""
        target = self._full(path)
        with _translated("write", self.locate(path)):
            if not self._renames:
                self._put(target, data)
                return
            folder, _, _ = target.rpartition("/")
            temp = f"{folder}/{TEMP_PREFIX}{uuid.uuid4().hex}"
            try:
                self._put(temp, data)
                self._fs.mv(temp, target)
            except Exception:
                with contextlib.suppress(Exception):  # report the failure of the write itself
                    self._fs.rm_file(temp)
                raise

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create the file unless it exists; atomic if the backend can, else checked just before."""
        target = self._full(path)
        with _translated("create", self.locate(path)):
            if self._fs.exists(target):
                return False
            self._make_parent(target)
            try:
                self._fs.pipe_file(target, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):
                # These errors mean that a backend does not support `mode`.
                self._put(target, data)
            return bool(self._fs.cat_file(target) == data)

    def read_bytes(self, path: str) -> bytes:
        """Return the file's bytes."""
        with _translated("read", self.locate(path)):
            return bytes(self._fs.cat_file(self._full(path)))

    def read_many(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Fetch chunk by chunk; some backends fetch a chunk's files concurrently."""
        for start in range(0, len(paths), READ_CHUNK):
            chunk = paths[start : start + READ_CHUNK]
            with _translated("read", self.uri):
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
        with _translated("list", self.locate(path)):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(target, detail=False)
            except FileNotFoundError:
                return []
        paths = {str(name).rstrip("/") for name in found} - {target}
        return sorted(path.rpartition("/")[2] for path in paths)

    def exists(self, path: str) -> bool:
        """Return whether a file or folder is there."""
        with _translated("look at", self.locate(path)):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._full(path)))

    def size(self, path: str) -> int:
        """Return the file's length in bytes."""
        with _translated("look at", self.locate(path)):
            return int(self._fs.size(self._full(path)))

    def move(self, source: str, target: str) -> None:
        """Rename; without a rename, copy and remove."""
        full_source, full_target = self._full(source), self._full(target)
        with _translated("move a file to", self.locate(target)):
            self._make_parent(full_target)
            self._fs.mv(full_source, full_target, recursive=bool(self._fs.isdir(full_source)))

    def remove(self, path: str) -> None:
        """Remove a file or a folder."""
        with _translated("remove", self.locate(path)), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    def probe(self) -> None:
        """Write and remove an object below the URI; also remove folders made for it."""
        missing: tuple[str, ...] = ()
        try:
            missing = self._missing_folders()
            name = f"{TEMP_PREFIX}{uuid.uuid4().hex}"
            self.write_bytes(name, b"probe")
            self.remove(name)
        except StorageError as error:
            raise OutputError(
                f"the output directory {self.uri} cannot be written: {error.__cause__}; "
                "check its permissions and credentials, or choose another output_root"
            ) from error
        finally:
            for folder in missing:
                with contextlib.suppress(Exception):  # object stores have no folders
                    self._fs.rmdir(folder)

    def _missing_folders(self) -> tuple[str, ...]:
        """Return the folders of the root that do not exist yet, the deepest first."""
        missing, folder = [], self._root
        with _translated("look at", self.uri):
            while folder and folder != "/" and not self._fs.exists(folder):
                missing.append(folder)
                folder = folder.rpartition("/")[0]
        return tuple(missing)

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
