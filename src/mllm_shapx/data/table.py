"""The interface of a dataset: named columns over numbered rows, read in parts."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mllm_shapx.errors import DatasetError, RowError
from mllm_shapx.plaintext import shown

UNREADABLE = (pa.ArrowException, ValueError, TypeError, ArithmeticError, LookupError)
"""Arrow's errors for values without a Python value: invalid UTF-8, time out of range, no time zone."""

BATCH_ROWS = 8192
"""Rows per batch when a column is scanned."""

MOST_ROWS = 10_000_000
"""Most rows of a dataset; more are refused before reading, because the selection scans every row."""


class Table(Protocol):
    """A dataset. Each call reads only the requested columns and rows."""

    @property
    def name(self) -> str:
        """Return the name for error messages: a file, or a repository with its commit."""

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column names in file order."""

    @property
    def commit(self) -> str | None:
        """Return the hub commit that was read, None for local files."""

    @property
    def folder(self) -> Path | None:
        """Return the base folder of relative paths in the rows."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all rows in order, at most `BATCH_ROWS` rows at a time."""

    def column(self, name: str) -> list[Any]:
        """Return one whole column as Python values."""

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of `columns` in row `index`.

        Raises:
            RowError: `unreadable_row` when that part of the file is damaged.
            DatasetError: When the file is gone.
        """

    def some_rows(
        self, indices: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """Yield the values of `columns` in the rows `indices`, which ascend; each part is read once.

        A row in a damaged part of the file is yielded as the `RowError` of `row`.

        Raises:
            DatasetError: When a file is gone.
        """

    def content(self, columns: Sequence[str]) -> str | None:
        """Return a hash of the files' contents in `columns`, None for a table with a `commit`."""


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


def column_values(table: Table, name: str) -> list[Any]:
    """Return one whole column of `table`, read batch by batch."""
    return [value for batch in table.batches([name]) for value in python_values(batch.column(0))]
