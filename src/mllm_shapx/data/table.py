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
"""What Arrow raises for a value that Python cannot hold: invalid UTF-8, a time too far away, no time zone."""

BATCH_ROWS = 8192
"""Rows read at once when a column is scanned."""

MOST_ROWS = 10_000_000
"""Rows of a dataset. More are refused before any is read: the selection looks at each of them."""


class Table(Protocol):
    """A dataset. Each call returns only the columns and rows that it names."""

    @property
    def name(self) -> str:
        """Return what error messages call it: a file, or a repository with its commit."""

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
        """Return where the relative paths found in the rows start."""

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

        A row in a damaged part of the file comes as the `RowError` that `row` raises.

        Raises:
            DatasetError: When a file is gone.
        """

    def content(self, columns: Sequence[str]) -> str | None:
        """Return a hash of what the files hold in `columns`, None for a table that has a `commit`."""


def refuse_too_many(name: str, rows: int) -> None:
    """Refuse a dataset of more than `MOST_ROWS` rows; a few kB of parquet may say that they hold 10^9.

    Raises:
        DatasetError: When it has more.
    """
    if rows > MOST_ROWS:
        raise DatasetError(
            f"{name}: has {rows:,} rows, and at most {MOST_ROWS:,} are taken; write the rows of this study "
            "into a file of their own, or name fewer files in dataset.path"
        )


def python_values(array: pa.Array) -> list[Any]:
    """Return an array's values as Python has them; None for those that Python cannot hold.

    Text that is not UTF-8 and times beyond the year 9999 are such: the one row that holds it fails by itself
    when it is read, and the others stay.
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
    """Reports the progress of a long scan on the standard error; a short one prints nothing."""

    def __init__(
        self, name: str, rows: int, *, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._rows, self._every_s, self._clock = name, rows, every_s, clock
        self._due = clock() + every_s

    def show(self, done: int) -> None:
        """Print that `done` rows were read, if it is time for a line."""
        if self._clock() < self._due:
            return
        self._due = self._clock() + self._every_s
        line = f"{self._name}: {done:,} of {self._rows:,} rows looked at"
        print(shown(line), file=sys.stderr, flush=True)


def column_values(table: Table, name: str) -> list[Any]:
    """Return one whole column of `table`, read batch by batch."""
    return [value for batch in table.batches([name]) for value in python_values(batch.column(0))]
