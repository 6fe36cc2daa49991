"""What a dataset is to the rest of the product: named columns over numbered rows, read in parts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mllm_shapx.errors import RowError

BATCH_ROWS = 8192
"""Rows read at once when a column is scanned."""


class Table(Protocol):
    """A dataset that stays on disk: each call reads only the columns and rows that it needs."""

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


def column_values(table: Table, name: str) -> list[Any]:
    """Return one whole column of `table`, read batch by batch."""
    return [value for batch in table.batches([name]) for value in batch.column(0).to_pylist()]
