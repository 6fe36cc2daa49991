"""A dataset in CSV files: an index of record offsets at opening, then only the records that are asked for."""

import ast
import bisect
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from mllm_shapx.data.contents import hash_of, read_pieces
from mllm_shapx.data.table import BATCH_ROWS, UNREADABLE, column_values, refuse_too_many
from mllm_shapx.errors import DatasetError, RowError

_SCAN_BYTES = 1 << 24
_QUOTE, _NEWLINE, _RETURN = b'"'[0], b"\n"[0], b"\r"[0]


@dataclass(frozen=True)
class _CsvFile:
    """One file and where its records lie; the header is not among them."""

    path: Path
    header: tuple[str, ...]
    starts: NDArray[np.int64]
    """Byte offset of each record."""
    ends: NDArray[np.int64]
    """Byte offset past each record, line end included."""

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes of the records `[first, last)`."""
        with self.path.open("rb") as stream:
            stream.seek(int(self.starts[first]))
            return stream.read(int(self.ends[last - 1] - self.starts[first]))


@dataclass(frozen=True)
class CsvTable:
    """CSV files with one header, one after the other; numbers and booleans are recognized."""

    name: str
    columns: tuple[str, ...]
    commit: str | None
    folder: Path | None
    _files: tuple[_CsvFile, ...]
    _types: dict[str, pa.DataType]
    """List types stand for lists written in the cells, as JSON or as Python."""
    _starts: tuple[int, ...]
    """Number of the first row of each file."""

    @classmethod
    def open(cls, files: Sequence[Path], *, name: str) -> Self:
        """Index `files` and find the type of each column, in two passes of bounded memory.

        Raises:
            DatasetError: When a file is missing, unreadable or no CSV, or the headers differ.
        """
        indexed = [_index(path) for path in files]
        for file in indexed[1:]:
            if file.header != indexed[0].header:
                raise DatasetError(
                    f"{file.path}: its header differs from that of {indexed[0].path}; "
                    "name files of one header in dataset.path"
                )
        counts = [len(file.starts) for file in indexed]
        refuse_too_many(name, sum(counts))
        return cls(
            name=name,
            columns=indexed[0].header,
            commit=None,
            folder=files[0].parent,
            _files=tuple(indexed),
            _types=_column_types(indexed),
            _starts=tuple(accumulate(counts[:-1], initial=0)),
        )

    @property
    def num_rows(self) -> int:
        """Return the records of all files."""
        return sum(len(file.starts) for file in self._files)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all records in order."""
        for file in self._files:
            for first, last in _chunks(len(file.starts)):
                table = _parse(file, first, last, self._types, columns).combine_chunks()
                yield from table.to_batches()

    def column(self, name: str) -> list[Any]:
        """Return one whole column as Python values."""
        return column_values(self, name)

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of `columns` in record `index`."""
        if not 0 <= index < self.num_rows:
            raise DatasetError(f"{self.name}: there is no row {index}; it has {self.num_rows} rows")
        number = bisect.bisect_right(self._starts, index) - 1
        place = index - self._starts[number]
        table = _parse(self._files[number], place, place + 1, self._types, columns)
        values: dict[str, Any] = table.to_pylist()[0]
        return values

    def some_rows(
        self, indices: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """Yield the values of `columns` in the records `indices`, which ascend."""
        wanted = np.asarray(indices, dtype=np.int64)
        for number, start in zip(range(len(self._files)), self._starts, strict=True):
            file = self._files[number]
            for first, last in _chunks(len(file.starts)):
                low, high = np.searchsorted(wanted, [start + first, start + last])
                if low == high:
                    continue
                places = wanted[low:high] - start
                values = _parse(file, int(places[0]), int(places[-1]) + 1, self._types, columns)
                found = values.take(pa.array(places - places[0])).to_pylist()
                yield from zip(wanted[low:high].tolist(), found, strict=True)

    def content(self, columns: Sequence[str]) -> str | None:  # noqa: ARG002 -- a line holds all of them
        """Return a hash of the files' bytes."""
        return hash_of(read_pieces(file.path, [(0, file.path.stat().st_size)]) for file in self._files)


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, BATCH_ROWS):
        yield first, min(first + BATCH_ROWS, count)


def _index(path: Path) -> _CsvFile:
    try:
        starts, ends = _record_bounds(path)
        if len(starts) == 0:
            raise DatasetError(f"{path}: is empty; the first line of a CSV file names the columns")
        with path.open("rb") as stream:
            stream.seek(int(starts[0]))
            header = stream.read(int(ends[0] - starts[0]))
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file; correct dataset.path") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}); check its permissions") from error
    return _CsvFile(path, _header_names(path, header), starts[1:], ends[1:])


def _record_bounds(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the start and end offsets of the records: a line break inside quotes ends none.

    A byte lies inside quotes when an odd number of quotes stands before it; a doubled quote changes nothing.
    """
    size = path.stat().st_size
    if size == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    found: list[NDArray[np.int64]] = []
    quotes = 0
    for offset in range(0, size, _SCAN_BYTES):
        block = data[offset : offset + _SCAN_BYTES]
        before = np.cumsum(block == _QUOTE, dtype=np.int64) + quotes
        found.append(np.flatnonzero((block == _NEWLINE) & (before % 2 == 0)) + offset + 1)
        quotes = int(before[-1])
    ends = np.concatenate(found)
    if quotes % 2:
        _refuse_open_quote(path, data, int(ends[-1]) if len(ends) else 0)
    if len(ends) == 0 or ends[-1] != size:
        ends = np.append(ends, size)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    length, opening = ends - starts, data[starts]
    blank = ((length == 1) & (opening == _NEWLINE)) | ((length == len(b"\r\n")) & (opening == _RETURN))
    return starts[~blank], ends[~blank]


def _refuse_open_quote(path: Path, data: NDArray[np.uint8], start: int) -> None:
    """Refuse a file whose last quote is never closed: the record that begins at `start` takes in the rest.

    Raises:
        DatasetError: Always.
    """
    line = 1 + int(np.count_nonzero(data[:start] == _NEWLINE))
    rest = int(np.count_nonzero(data[start:] == _NEWLINE))
    raise DatasetError(
        f"{path}: a quote in the record that begins in line {line} is never closed, and the {rest} line(s) "
        "from there on would be one value; close it, or double a quote that belongs to the text"
    )


def _header_names(path: Path, header: bytes) -> tuple[str, ...]:
    try:
        names = tuple(next(csv.reader(io.StringIO(header.decode("utf-8-sig"), newline=""))))
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        raise DatasetError(f"{path}: its first line is no CSV header ({error}); write it as UTF-8") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"{path}: the header names a column twice: {', '.join(twice)}; rename one")
    return names


def _parse(
    file: _CsvFile,
    first: int,
    last: int,
    types: dict[str, pa.DataType],
    columns: Sequence[str] | None = None,
) -> pa.Table:
    try:
        data = file.read(first, last)
        table = pacsv.read_csv(
            pa.BufferReader(data),
            # One block: a record longer than a block is an error.
            read_options=pacsv.ReadOptions(
                column_names=list(file.header), use_threads=False, block_size=len(data) + 1
            ),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types={n: pa.string() if pa.types.is_list(t) else t for n, t in types.items()},
                include_columns=None if columns is None else list(columns),
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                # What pandas writes for a missing value; in quotes it is text.
                null_values=["", "nan", "NaN"],
            ),
        )
    except UNREADABLE as error:
        raise DatasetError(
            f"{file.path}: is no CSV file with {len(file.header)} columns ({error}); "
            "quote values that hold commas or line breaks"
        ) from error
    except OSError as error:
        raise DatasetError(f"{file.path}: cannot be read ({error}); restore the file") from error
    if table.num_rows != last - first:
        raise DatasetError(
            f"{file.path}: a value holds a lone quote; put such values in quotes and double the inner ones"
        )
    return _with_lists(table, types)


def _with_lists(table: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    for place, name in enumerate(table.column_names):
        if pa.types.is_list(types.get(name, pa.null())):
            lists = [None if cell is None else _as_list(cell) for cell in table.column(name).to_pylist()]
            table = table.set_column(place, name, pa.array(lists, types[name]))
    return table


def _as_list(cell: str) -> list[str | None] | None:
    """Return the texts of a cell that holds a list, None when it holds none."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
            return value
    return None


def _column_types(files: Sequence[_CsvFile]) -> dict[str, pa.DataType]:
    """Return the narrowest type that holds every value of each column."""
    types = dict.fromkeys(files[0].header, pa.null())
    lists = set(files[0].header)
    for file in files:
        for first, last in _chunks(len(file.starts)):
            table = _parse(file, first, last, {})
            if any(pa.types.is_binary(kind) for kind in table.schema.types):
                raise DatasetError(f"{file.path}: is not in UTF-8; save it as UTF-8")
            types = {name: _wider(kind, table.schema.field(name).type) for name, kind in types.items()}
            lists = {name for name in lists if _holds_lists(table.column(name))}
    return {
        name: pa.list_(pa.string()) if name in lists and kind == pa.string() else kind
        for name, kind in types.items()
    }


def _holds_lists(column: pa.ChunkedArray) -> bool:
    if not pa.types.is_string(column.type):
        return bool(pa.types.is_null(column.type))
    return all(
        cell is None or _as_list(cell) is not None for chunk in column.chunks for cell in _cells(chunk)
    )


def _cells(chunk: pa.Array) -> Iterator[str | None]:
    """Yield the values one by one: the first that is no list ends the search."""
    return (cell.as_py() for cell in chunk)


def _wider(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    kinds = {_kind(left), _kind(right)} - {pa.null()}
    if not kinds:
        return pa.null()
    if len(kinds) == 1:
        return kinds.pop()
    return pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()


def _kind(kind: pa.DataType) -> pa.DataType:
    """Return `kind` if filters and text can use it; dates and times stay the text that was written."""
    return kind if kind in {pa.null(), pa.int64(), pa.float64(), pa.bool_()} else pa.string()
