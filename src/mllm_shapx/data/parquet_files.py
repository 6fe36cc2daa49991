"""A dataset in parquet files, read by row group through a memory map."""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_shapx.data.contents import hash_of, read_pieces
from mllm_shapx.data.table import BATCH_ROWS, UNREADABLE, column_values, refuse_too_many
from mllm_shapx.errors import DatasetError, RowError

_LARGE_BYTES = 1 << 26
"""Memory is freed after reading a row of a row group this large: writers often put all recordings
of a file into one dictionary page, which cannot be decoded in parts."""
_FOOTER_END = 8
"""Bytes after a footer: its length and the magic number."""
_SEEK_BYTES = 1 << 22
"""Approximate bytes decoded at a time to reach one row: many rows of text, few recordings."""


@dataclass(frozen=True)
class ParquetTable:
    """Parquet files of one schema, one after the other."""

    name: str
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    commit: str | None
    folder: Path | None
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
            files=tuple(files),
            columns=columns,
            commit=commit,
            folder=folder if folder is not None else files[0].parent,
            _metadata=tuple(footers),
            _starts=tuple(accumulate(counts[:-1], initial=0)),
        )

    @property
    def num_rows(self) -> int:
        """Return the rows of all files."""
        return sum(footer.num_rows for footer in self._metadata)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all rows in order."""
        for number, path in enumerate(self.files):
            try:
                yield from self._reader(number).iter_batches(
                    batch_size=BATCH_ROWS, columns=list(columns), use_threads=False
                )
            except (*UNREADABLE, OSError) as error:
                raise DatasetError(f"{path}: cannot be read ({error}); restore the file") from error

    def column(self, name: str) -> list[Any]:
        """Return one whole column as Python values."""
        return column_values(self, name)

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of `columns` in row `index`; decodes its row group only up to that row."""
        if not 0 <= index < self.num_rows:
            raise DatasetError(f"{self.name}: there is no row {index}; it has {self.num_rows} rows")
        number = bisect.bisect_right(self._starts, index) - 1
        group, offset = _row_group(self._metadata[number], index - self._starts[number])
        size = _stored_bytes(self._metadata[number], group, columns)
        try:
            return self._seek(number, group, offset, columns, size)
        except (*UNREADABLE, OSError) as error:
            raise _row_failure(self.files[number], index, error) from error
        finally:
            if size >= _LARGE_BYTES:
                pa.default_memory_pool().release_unused()

    def _seek(
        self, number: int, group: int, offset: int, columns: Sequence[str], size: int
    ) -> dict[str, Any]:
        """Return one row of a row group that stores `size` bytes in `columns`."""
        for _, values in self._pick(number, group, [offset], columns, size):
            return values
        raise RowError("unreadable_row", f"{self.files[number]}: row group {group} ends before row {offset}")

    def some_rows(
        self, indices: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """Yield the values of `columns` in the rows `indices`, which ascend; reads only their row groups."""
        for (number, group, start), of_group in groupby(indices, self._place):
            wanted = list(of_group)
            size = _stored_bytes(self._metadata[number], group, columns)
            try:
                for index, values in self._pick(
                    number, group, [row - start for row in wanted], columns, size
                ):
                    yield index + start, values
                    wanted.remove(index + start)
            except (pa.ArrowException, OSError) as error:
                failure = _row_failure(self.files[number], wanted[0], error)
                if not isinstance(failure, RowError):
                    raise failure from error
                yield from ((index, failure) for index in wanted)
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
        return hash_of(
            read_pieces(path, _pieces(path, footer, columns))
            for path, footer in zip(self.files, self._metadata, strict=True)
        )

    def _place(self, index: int) -> tuple[int, int, int]:
        """Return the file and the row group of a row, and the index of the group's first row."""
        number = bisect.bisect_right(self._starts, index) - 1
        group, offset = _row_group(self._metadata[number], index - self._starts[number])
        return number, group, index - offset

    def _pick(
        self, number: int, group: int, offsets: Sequence[int], columns: Sequence[str], size: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield rows of a row group by their offsets in it, in one pass."""
        start, waiting = 0, deque(offsets)
        for batch in self._group_batches(number, group, columns, size):
            while waiting and waiting[0] < start + batch.num_rows:
                offset = waiting.popleft()
                yield offset, batch.slice(offset - start, 1).to_pylist()[0]
            if not waiting:
                return
            start += batch.num_rows

    def _group_batches(
        self, number: int, group: int, columns: Sequence[str], size: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield a row group that stores `size` bytes in `columns`, in pieces that fit in memory."""
        rows = self._metadata[number].row_group(group).num_rows
        at_once = min(BATCH_ROWS, max(1, _SEEK_BYTES * rows // max(1, size)))
        yield from self._reader(number).iter_batches(
            batch_size=at_once, row_groups=[group], columns=list(columns), use_threads=False
        )

    def _reader(self, number: int) -> pq.ParquetFile:
        # Opened for each use: a reader is not thread-safe, and opening is cheap with a known footer.
        return pq.ParquetFile(
            self.files[number], metadata=self._metadata[number], memory_map=True, pre_buffer=False
        )


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path, memory_map=True)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file; correct dataset.path") from error
    except UNREADABLE as error:
        raise DatasetError(
            f"{path}: is not a parquet file, or is cut short ({error}); write or download it again"
        ) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}); check its permissions") from error


def _columns(path: Path, footer: pq.FileMetaData) -> tuple[str, ...]:
    """Return the names of a file's columns.

    Raises:
        DatasetError: When the schema is unreadable, or a name occurs twice.
    """
    try:
        names = tuple(footer.schema.to_arrow_schema().names)
    except UNREADABLE as error:
        raise DatasetError(f"{path}: its columns cannot be read ({error}); write it again") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"{path}: names a column twice: {', '.join(twice)}; rename one")
    return names


def _check_same_columns(first: Path, columns: tuple[str, ...], path: Path, footer: pq.FileMetaData) -> None:
    names = set(_columns(path, footer))
    differing = sorted(names.symmetric_difference(columns))
    if differing:
        raise DatasetError(
            f"{path}: its columns differ from those of {first}: {', '.join(differing)}; "
            "name files of one schema in dataset.path"
        )


def _row_group(footer: pq.FileMetaData, row: int) -> tuple[int, int]:
    """Return the row group that holds `row` and the row's place in it."""
    for group in range(footer.num_row_groups):
        rows = footer.row_group(group).num_rows
        if row < rows:
            return group, row
        row -= rows
    raise IndexError(row)


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


def _row_failure(path: Path, index: int, error: Exception) -> Exception:
    """Return RowError for a damaged part of the file, DatasetError for a failing file system."""
    if isinstance(error, OSError) and error.errno is not None:
        return DatasetError(f"{path}: cannot be read ({error}); restore the file")
    return RowError("unreadable_row", f"{path}: row {index} cannot be read ({error})")
