"""A dataset: named columns over numbered rows, read in parts."""

import contextlib
import hashlib
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_shapx.errors import DatasetError, RowError
from mllm_shapx.plaintext import shown

UNREADABLE = (pa.ArrowException, ValueError, TypeError, ArithmeticError, LookupError)
"""Arrow's errors for values without a Python value: invalid UTF-8, time out of range, no time zone."""

BATCH_ROWS = 8192
"""Rows per batch when a column is scanned."""

MOST_ROWS = 10_000_000
"""Most rows of a dataset; more are refused before reading, because the selection scans every row."""

_BYTES_AT_ONCE = 1 << 22
"""Approximate bytes decoded at a time to reach one row: many rows of text, few recordings."""
_HASHED_AT_ONCE = 1 << 20

Values = dict[str, Any] | RowError
"""Column -> value of one row, or why the row cannot be read."""


@dataclass(frozen=True)
class Table(ABC):
    """A dataset. Each call reads only the requested columns and rows."""

    name: str
    """Name for error messages: a file, or a repository with its commit."""
    num_rows: int
    columns: tuple[str, ...]
    """Column names in file order."""
    commit: str | None
    """The hub commit that was read, None for local files."""
    folder: Path | None
    """Base folder of relative paths in the rows."""

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all rows in order, at most `BATCH_ROWS` rows at a time."""

    @abstractmethod
    def some_rows(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Values]]:
        """Yield the values of `columns` in the rows `indices`, which ascend, each once. A part is read once.

        A row that cannot be read, for example in a damaged part of the file, is yielded as a `RowError`
        `unreadable_row`.

        Raises:
            DatasetError: When a file is gone.
        """

    @abstractmethod
    def content(self, columns: Sequence[str]) -> str | None:
        """Return a hash of the files' contents in `columns`, None for a table with a `commit`."""

    def column(self, name: str) -> list[Any]:
        """Return one whole column as Python values."""
        return [value for batch in self.batches([name]) for value in python_values(batch.column(0))]

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of `columns` in row `index`.

        Raises:
            RowError: `unreadable_row` when that part of the file is damaged.
            DatasetError: When there is no such row, or the file is gone.
        """
        if not 0 <= index < self.num_rows:
            raise DatasetError(f"{self.name}: there is no row {index}; it has {self.num_rows} rows")
        ((_, values),) = self.some_rows([index], columns)
        if isinstance(values, RowError):
            raise values
        return values


@dataclass(frozen=True)
class ArrowTable(Table):
    """Arrow data in memory, or mapped into it."""

    data: pa.Table
    files: tuple[Path, ...] = ()
    """The local files that the data was read from."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all rows in order."""
        yield from self.data.select(list(columns)).to_batches(max_chunksize=BATCH_ROWS)

    def some_rows(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Values]]:
        """Yield the values of `columns` in the rows `indices`."""
        if not indices:
            return
        first = indices[0]
        data = self.data.select(list(columns)).slice(first, indices[-1] - first + 1)
        batches = data.to_batches(max_chunksize=rows_at_once(data.num_rows, data.nbytes))
        yield from pick_rows(batches, indices, self.name, first)

    def content(self, columns: Sequence[str]) -> str | None:  # noqa: ARG002 -- the files hold all of them
        """Return a hash of the files' bytes, None without files."""
        return content_hash((path, [(0, sys.maxsize)]) for path in self.files) if self.files else None


def rows_at_once(rows: int, num_bytes: int) -> int:
    """Return how many rows of data of `rows` rows and `num_bytes` bytes are decoded at a time."""
    return min(BATCH_ROWS, max(1, _BYTES_AT_ONCE * rows // max(1, num_bytes)))


def pick_rows(
    batches: Iterable[pa.RecordBatch], indices: Sequence[int], where: str | Path, start: int = 0
) -> Iterator[tuple[int, Values]]:
    """Yield the rows `indices`, which ascend, of the batches from row `start` on."""
    waiting = deque(indices)
    for batch in batches:
        wanted = []
        while waiting and waiting[0] < start + batch.num_rows:
            wanted.append(waiting.popleft())
        if len(wanted) == batch.num_rows and (rows := _all_rows(batch)) is not None:
            yield from zip(wanted, rows, strict=True)
        else:
            yield from ((index, _row(batch, index - start, where, index)) for index in wanted)
        start += batch.num_rows
        if not waiting:
            return


def _all_rows(batch: pa.RecordBatch) -> list[dict[str, Any]] | None:
    """Return all rows, much faster than one by one; None when one of them cannot be read."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UNREADABLE:
        return None
    return rows


def _row(batch: pa.RecordBatch, offset: int, where: str | Path, index: int) -> Values:
    try:
        values: dict[str, Any] = batch.slice(offset, 1).to_pylist()[0]
    except UNREADABLE as error:
        return unreadable_row(where, index, error)
    return values


def unreadable_row(where: str | Path, index: int, error: Exception) -> RowError:
    """Return the error of a row in a damaged part of a file."""
    return RowError("unreadable_row", f"{where}: row {index} cannot be read ({error})")


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """Translate a failure to open a dataset's file.

    Raises:
        DatasetError: When the file is missing or cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file; correct dataset.path") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}); check its permissions") from error


def refuse_repeated(path: Path, names: Sequence[str]) -> None:
    """Refuse a file that names a column twice.

    Raises:
        DatasetError: With the names.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"{path}: names a column twice: {', '.join(twice)}; rename one")


def content_hash(files: Iterable[tuple[Path, Iterable[tuple[int, int]]]]) -> str:
    """Return `content:` and 40 hex digits of the hash over parts of files, each `(offset, length)`.

    It stands for the commit of local files.

    Raises:
        DatasetError: When a file cannot be read.
    """
    total = hashlib.blake2b(digest_size=20)
    for path, parts in files:
        of_file = hashlib.blake2b(digest_size=20)
        try:
            with path.open("rb") as file:
                for offset, length in parts:
                    file.seek(offset)
                    left = length
                    while left > 0 and (piece := file.read(min(left, _HASHED_AT_ONCE))):
                        left -= len(piece)
                        of_file.update(piece)
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
        total.update(of_file.digest())
    return f"content:{total.hexdigest()}"


def refuse_too_many(name: str, rows: int) -> None:
    """Refuse a dataset of more than `MOST_ROWS` rows; a few kB of parquet may claim 10^9 rows.

    Raises:
        DatasetError: When it has more.
    """
    if rows > MOST_ROWS:
        raise DatasetError(
            f"{name}: has {rows:,} rows, and at most {MOST_ROWS:,} are taken; write the rows of this study "
            "into a file of their own, or name fewer files in dataset.path"
        )


def python_values(array: pa.Array) -> list[Any]:
    """Return an array's values as Python values; None for values without one.

    Examples are text that is not UTF-8 and times after the year 9999. Only the row with such a value fails,
    when it is read.
    """
    try:
        values: list[Any] = array.to_pylist()
    except UNREADABLE:
        return [_python_value(array, place) for place in range(len(array))]
    return values


def _python_value(array: pa.Array, place: int) -> Any:
    try:
        return array[place].as_py()
    except UNREADABLE:
        return None


class ScanNotice:
    """Reports the progress of a long scan on standard error; a short scan prints nothing."""

    def __init__(
        self, name: str, rows: int, *, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._rows, self._every_s, self._clock = name, rows, every_s, clock
        self._due = clock() + every_s

    def show(self, done: int) -> None:
        """Print the number of rows read, if a line is due."""
        if self._clock() < self._due:
            return
        self._due = self._clock() + self._every_s
        line = f"{self._name}: {done:,} of {self._rows:,} rows looked at"
        print(shown(line), file=sys.stderr, flush=True)
