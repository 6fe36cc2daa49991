"""Files that a user asks for: pages, exports and figures, each written whole or not at all."""

import contextlib
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.records.storage import LocalStorage, Storage

if TYPE_CHECKING:
    import pandas as pd

type TableForm = Literal["csv", "parquet"]

PAGE = "report.html"
"""The only file that a reading command writes into a study."""
_DEEPEST = 6
"""Folders above a path that may be a study's directory: its deepest files are recordings of a sample."""


def write_output(output: Path, content: bytes) -> None:
    """Write a file in the place of an older one.

    Raises:
        UsageError: When something other than a file is there.
        StorageError: When the file cannot be written.
    """
    refuse_special(output)
    with written_whole(output) as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextlib.contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Give a path beside `output` to write to. At the end it replaces `output`; a failure leaves nothing.

    Raises:
        StorageError: When the file cannot be written.
    """
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(output)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"{output} cannot be written: {reason}; name another file") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def new_output(storage: Storage, output: Path | None, name: str, *, overwrite: bool) -> Path:
    """Return the file to write of a study in `storage`: `output`, or `name` in the working directory.

    Raises:
        UsageError: When it is in the study's directory, is no ordinary file, or is there already.
    """
    output = output or Path(name)
    refuse_inside(storage, output)
    refuse_special(output)
    if output.exists() and not overwrite:
        raise UsageError(
            f"{output} is there already; replace it with --overwrite, or name another: --output FILE"
        )
    return output


@contextlib.contextmanager
def table_file(
    output: Path, form: TableForm, empty: "pd.DataFrame"
) -> Iterator[Callable[["pd.DataFrame"], object]]:
    """Give a function that adds lines to a new file, which is written whole or not at all (`written_whole`).

    `empty` is a table without lines. Its columns are the header, which a file without lines has too. Its
    types are those of Parquet, where NaN and None are null.
    """
    with written_whole(output) as path:
        if form == "csv":
            with path.open("w", encoding="utf-8", newline="") as stream:
                empty.to_csv(stream, index=False, lineterminator="\n")
                yield lambda table: table.to_csv(stream, index=False, header=False, lineterminator="\n")
            return
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        types = {"O": pa.string(), "i": pa.int64(), "f": pa.float64()}
        schema = pa.schema([(name, types[dtype.kind]) for name, dtype in empty.dtypes.items()])
        with ParquetWriter(path, schema, compression="zstd") as writer:

            def write(table: "pd.DataFrame") -> None:
                writer.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False))

            yield write


def refuse_special(output: Path) -> None:
    """Refuse to write through a link, or over a folder or a device.

    Raises:
        UsageError: When something other than a file is there.
    """
    try:
        mode = output.lstat().st_mode
    except OSError:
        return  # it does not exist, or writing finds the problem
    if stat.S_ISREG(mode):
        return
    what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
    raise UsageError(
        f"{output} is {what}, and is not written to; remove it, or name another file: --output FILE"
    )


def refuse_inside(storage: Storage, output: Path, *, is_page: bool = False) -> None:
    """Refuse to write into a study's directory: the one that is read, or any other.

    Args:
        storage: The experiment set's storage.
        output: A file or folder to write.
        is_page: Whether a report is written, which may be `report.html` beside the runs or in one.

    Raises:
        UsageError: When `output` is in a study.
    """
    found = output.resolve()
    root = Path(storage.uri).resolve() if isinstance(storage, LocalStorage) else None
    if root is None or not found.is_relative_to(root):
        root = _study_around(found)
    if root is None:
        return
    if is_page and found.name == PAGE and root in {found.parent, found.parent.parent}:
        return
    but = f" but for its {PAGE}" if is_page else ""
    raise UsageError(
        f"{output} is in the study's directory {root}, which is left as it is{but}; name another place"
    )


def _study_around(path: Path) -> Path | None:
    """Return the directory of the experiment set that a path is in, None where it is in none."""
    for folder in (path, *path.parents)[:_DEEPEST]:
        if _is_run(folder):
            return folder.parent
        if any(_is_run(spec.parent) for spec in folder.glob("*/spec.json")):
            return folder
    return None


def _is_run(folder: Path) -> bool:
    """Whether a folder looks like a run's; many folders are called `samples`."""
    return (folder / "spec.json").is_file() and (folder / "samples").is_dir()
