"""A dataset in parquet files, read by row group through a memory map."""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_shapx.data.table import (
    BATCH_ROWS,
    UNREADABLE,
    Table,
    Values,
    content_hash,
    opening,
    pick_rows,
    refuse_repeated,
    refuse_too_many,
    rows_at_once,
    unreadable_row,
)
from mllm_shapx.errors import DatasetError

_LARGE_BYTES = 1 << 26
"""Memory is freed after reading a row of a row group this large: writers often put all recordings
of a file into one dictionary page, which cannot be decoded in parts."""
_FOOTER_END = 8
"""Bytes after a footer: its length and the magic number."""


@dataclass(frozen=True)
class ParquetTable(Table):
    """Parquet files of one schema, one after the other."""

    files: tuple[Path, ...]
    _metadata: tuple[pq.FileMetaData, ...]
    _starts: tuple[int, ...]
    """Number of the first row of each file."""

    @classmethod
    def open(
        cls, files: Sequence[Path], *, name: str, commit: str | None = None, folder: Path | None = None
    ) -> Self:
        """Read the footers of `files`; no row is read.

        Raises:
            DatasetError: When a file is missing, unreadable, not parquet, or its columns differ from the
                first.
        """
        footers = [_footer(path) for path in files]
        columns = _columns(files[0], footers[0])
        for path, footer in zip(files, footers, strict=True):
            _check_same_columns(files[0], columns, path, footer)
        counts = [footer.num_rows for footer in footers]
        refuse_too_many(name, sum(counts))
        return cls(
            name=name,
            num_rows=sum(counts),
            columns=columns,
            commit=commit,
            folder=folder if folder is not None else files[0].parent,
            files=tuple(files),
            _metadata=tuple(footers),
            _starts=tuple(accumulate(counts[:-1], initial=0)),
        )

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all rows in order."""
        for number, path in enumerate(self.files):
            try:
                yield from self._reader(number).iter_batches(
                    batch_size=BATCH_ROWS, columns=list(columns), use_threads=False
                )
            except (*UNREADABLE, OSError) as error:
                raise DatasetError(f"{path}: cannot be read ({error}); restore the file") from error

    def some_rows(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Values]]:
        """Yield the values of `columns` in the rows `indices`; decodes row groups up to the last of them."""
        for (number, group, start), of_group in groupby(indices, self._place):
            path, waiting = self.files[number], deque(of_group)
            size = _stored_bytes(self._metadata[number], group, columns)
            batches = self._group_batches(number, group, columns, size)
            try:
                for index, values in pick_rows(batches, tuple(waiting), path, start):
                    yield index, values
                    waiting.popleft()
                if waiting:
                    raise ValueError(f"row group {group} ends before it")
            except (*UNREADABLE, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise DatasetError(f"{path}: cannot be read ({error}); restore the file") from error
                yield from ((index, unreadable_row(path, index, error)) for index in waiting)
            finally:
                if size >= _LARGE_BYTES:
                    pa.default_memory_pool().release_unused()

    def content(self, columns: Sequence[str]) -> str | None:
        """Return a hash of the files' footers and of the bytes of `columns`; None for hub files.

        A footer has the size and offset of every column, so most changes of other columns change the hash
        too.
        """
        if self.commit is not None:
            return None
        return content_hash(
            (path, _pieces(path, footer, columns))
            for path, footer in zip(self.files, self._metadata, strict=True)
        )

    def _place(self, index: int) -> tuple[int, int, int]:
        """Return the file and the row group of a row, and the index of the group's first row."""
        number = bisect.bisect_right(self._starts, index) - 1
        start = self._starts[number]
        for group in range(self._metadata[number].num_row_groups):
            rows = self._metadata[number].row_group(group).num_rows
            if index < start + rows:
                return number, group, start
            start += rows
        raise IndexError(index)

    def _group_batches(
        self, number: int, group: int, columns: Sequence[str], size: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield a row group that stores `size` bytes in `columns`, in pieces that fit in memory."""
        rows = self._metadata[number].row_group(group).num_rows
        yield from self._reader(number).iter_batches(
            batch_size=rows_at_once(rows, size), row_groups=[group], columns=list(columns), use_threads=False
        )

    def _reader(self, number: int) -> pq.ParquetFile:
        # Opened for each use: a reader is not thread-safe, and opening is cheap with a known footer.
        return pq.ParquetFile(
            self.files[number], metadata=self._metadata[number], memory_map=True, pre_buffer=False
        )


def _footer(path: Path) -> pq.FileMetaData:
    with opening(path):
        try:
            return pq.read_metadata(path, memory_map=True)
        except UNREADABLE as error:
            raise DatasetError(
                f"{path}: is not a parquet file, or is cut short ({error}); write or download it again"
            ) from error


def _columns(path: Path, footer: pq.FileMetaData) -> tuple[str, ...]:
    try:
        names = tuple(footer.schema.to_arrow_schema().names)
    except UNREADABLE as error:
        raise DatasetError(f"{path}: its columns cannot be read ({error}); write it again") from error
    refuse_repeated(path, names)
    return names


def _check_same_columns(first: Path, columns: tuple[str, ...], path: Path, footer: pq.FileMetaData) -> None:
    names = set(_columns(path, footer))
    differing = sorted(names.symmetric_difference(columns))
    if differing:
        raise DatasetError(
            f"{path}: its columns differ from those of {first}: {', '.join(differing)}; "
            "name files of one schema in dataset.path"
        )


def _stored_bytes(footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> int:
    """Return the uncompressed bytes of `columns` in a row group."""
    chunks = footer.row_group(group)
    return sum(
        chunk.total_uncompressed_size
        for chunk in map(chunks.column, range(chunks.num_columns))
        if chunk.path_in_schema.split(".")[0] in columns
    )


def _pieces(path: Path, footer: pq.FileMetaData, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Return (offset, length) of the footer and of every chunk of `columns`."""
    size = path.stat().st_size
    length = footer.serialized_size
    found = [(max(0, size - length - _FOOTER_END), size)]
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] in columns:
                first = chunk.dictionary_page_offset or chunk.data_page_offset
                found.append((min(first, chunk.data_page_offset), chunk.total_compressed_size))
    return found
