"""The interface of storage (a local directory or any fsspec URI), and JSON files in it."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from mllm_shapx.records.fsspec_storage import FsspecStorage as FsspecStorage  # noqa: PLC0414 -- part of this module
from mllm_shapx.records.local_storage import TEMP_PREFIX
from mllm_shapx.records.local_storage import LocalStorage as LocalStorage  # noqa: PLC0414

_DEEPEST = 64
"""Most nested levels in a file that is read; deeper data overflows the stack of recursive functions."""


class Storage(Protocol):
    """A directory of files. Paths are relative POSIX strings; writing a file creates its folders.

    All methods but `probe` raise StorageError on an I/O failure, with the path, the reason and the fix.
    """

    uri: str
    """The directory's path or URI, for the user."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Replace the file atomically; after a crash it has the old bytes or the new ones."""

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create the file with its content unless it exists; return whether this call created it."""

    def read_bytes(self, path: str) -> bytes:
        """Return the file's bytes.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the path is a folder, a pipe or a device.
        """

    def read_many(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Yield every path, in order, with its bytes or the error of reading it."""

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names directly below a folder; empty when it does not exist."""

    def exists(self, path: str) -> bool:
        """Return whether a file or folder is there."""

    def size(self, path: str) -> int:
        """Return the file's length in bytes.

        Raises:
            FileNotFoundError: When there is no such file.
        """

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder; creates the folder of `target`."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its contents; a missing path is ignored."""

    def probe(self) -> None:
        """Check that files can be written here; leaves nothing behind.

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
    """Return the path or URI of `parts` below `root`."""
    base = root if root.endswith("://") else root.rstrip("/") + "/"
    return base + "/".join(parts)


def unfinished(storage: Storage, folders: Iterable[str]) -> list[str]:
    """Return the temporary files in some folders; interrupted writes leave them."""
    return [
        f"{folder}/{name}"
        for folder in folders
        for name in storage.list(folder)
        if name.startswith(TEMP_PREFIX)
    ]


def numbered(storage: Storage, path: str) -> str:
    """Return `path.N` with the first number N, from 1, that is free."""
    paths = (f"{path}.{number}" for number in itertools.count(1))
    return next(path for path in paths if not storage.exists(path))


def encode_json(data: Any) -> bytes:
    """Return JSON bytes for a file: indented by 2, with a final newline, without NaN."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate in broken text cannot be encoded.
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
        ValueError: When they are not JSON; the message has the reason.
    """
    if not data.strip(b" \t\r\n\0"):
        raise ValueError("it is empty")
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    # Few files have so many brackets, and counting them is cheap compared to parsing.
    if data.count(b"[") + data.count(b"{") > _DEEPEST:
        refuse_deep(content)
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def refuse_deep(content: Any) -> None:
    """Refuse JSON data whose objects and lists are nested too deeply.

    Raises:
        ValueError: When they exceed the limit.
    """
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError("it is nested too deeply")
