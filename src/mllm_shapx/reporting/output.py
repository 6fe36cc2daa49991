"""Files that a user asks for: pages, exports and figures, each written whole or not at all."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.records.storage import LocalStorage, Storage


def write_output(output: Path, content: bytes) -> None:
    """Write a file in the place of an older one.

    Raises:
        UsageError: When something other than a file is there.
        StorageError: When the file cannot be written.
    """
    refuse_special(output)
    try:
        LocalStorage(output.parent).write_bytes(output.name, content)
    except StorageError as error:
        raise StorageError(f"{output} cannot be written: {_cause(error)}; name another file") from error


@contextlib.contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Give a path beside `output` to write to, which takes its place at the end; nothing stays of a failure.

    Raises:
        StorageError: When the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(handle)
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror}; name another file") from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes a file that only its owner reads.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(output)
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_special(output: Path) -> None:
    """Refuse to write through a link, or over a folder or a device.

    Raises:
        UsageError: When something other than a file is there.
    """
    try:
        mode = output.lstat().st_mode
    except OSError:
        return  # not there; what else may be wrong is found by writing
    if stat.S_ISREG(mode):
        return
    what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
    raise UsageError(
        f"{output} is {what}, and is not written to; remove it, or name another file: --output FILE"
    )


def refuse_inside(storage: Storage, output: Path) -> None:
    """Refuse to write into a study's directory.

    Raises:
        UsageError: When `output` is below it.
    """
    if not isinstance(storage, LocalStorage):
        return
    root = Path(storage.uri).resolve()
    if output.resolve().is_relative_to(root):
        raise UsageError(
            f"{output} is in the study's directory {root}, which is left as it is; name another place"
        )


def _cause(error: StorageError) -> str:
    cause = error.__cause__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error)
