"""A dataset in CSV files, read by Arrow's CSV reader into memory.

The CSV reader of `datasets` is no alternative: it takes the words "None", "null" and "NA" for missing values,
even in quotes, renames repeated columns, fails where numbers turn to text far down, and imports pandas.

This module corrects Arrow's reader:

- An unclosed quote would put all following rows into one value: such a file is refused.
- Bytes that are not UTF-8 and repeated column names are refused.
- Dates would become timestamps: they stay text.
- Types are found per file: several files get the narrowest types that fit the values of all.
- Lists in cells, in JSON or Python syntax, are read as lists.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from mllm_shapx.data.table import UNREADABLE, ArrowTable, opening, refuse_repeated, refuse_too_many
from mllm_shapx.errors import DatasetError

_LARGEST_BLOCK = 1 << 30
"""Bytes that Arrow parses at a time; the longest possible record."""
_QUOTE, _NEWLINE = b'"'[0], b"\n"[0]

_Types = Mapping[str, pa.DataType]


def open_csv(files: Sequence[Path], *, name: str) -> ArrowTable:
    """Read CSV files of one header, one after the other.

    Numbers, booleans and lists of texts are recognized.

    Raises:
        DatasetError: When a file is missing, unreadable or not CSV, or the headers differ.
    """
    tables = [_read_checked(path) for path in files]
    for path, table in zip(files, tables, strict=True):
        if table.column_names != tables[0].column_names:
            raise DatasetError(
                f"{path}: its header differs from that of {files[0]}; "
                "name files of one header in dataset.path"
            )
    refuse_too_many(name, sum(table.num_rows for table in tables))
    types = _common_types(tables)
    # Parse the text again: a number in a text column keeps its leading zeros.
    same = [
        table if dict(zip(types, table.schema.types, strict=True)) == types else _read(path, types)
        for path, table in zip(files, tables, strict=True)
    ]
    data = _with_lists(pa.concat_tables(same))
    return ArrowTable(name, data.num_rows, tuple(types), None, files[0].parent, data, tuple(files))


def _read_checked(path: Path) -> pa.Table:
    """Return a file's table with the types that Arrow finds."""
    table = _read(path, {})
    refuse_repeated(path, table.column_names)
    if any(pa.types.is_binary(kind) for kind in table.schema.types):
        raise DatasetError(f"{path}: is not in UTF-8; save it as UTF-8")
    return table


def _read(path: Path, types: _Types) -> pa.Table:
    data = _content(path)
    _refuse_open_quote(path, data)
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            # One block if possible: a record longer than a block is an error.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=min(len(data) + 1, _LARGEST_BLOCK)),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=types,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                # Missing values as pandas writes them; in quotes they are text.
                null_values=["", "nan", "NaN"],
            ),
        )
        table.column_names  # noqa: B018 -- raises when the header is not UTF-8
    except UNREADABLE as error:
        raise DatasetError(
            f"{path}: is no CSV file with a header ({error}); quote values that hold commas or line breaks, "
            "and save it as UTF-8"
        ) from error
    return table


def _content(path: Path) -> bytes:
    """Return a file's bytes with a final line break; without it, Arrow ignores a lone header."""
    with opening(path):
        data = path.read_bytes()
    if not data.strip():
        raise DatasetError(f"{path}: is empty; the first line of a CSV file names the columns")
    return data if data.endswith(b"\n") else data + b"\n"


def _refuse_open_quote(path: Path, content: bytes) -> None:
    """Refuse a file with an odd number of quotes: the last one is never closed."""
    if content.count(b'"') % 2 == 0:
        return
    data = np.frombuffer(content, dtype=np.uint8)
    # A line break ends a record when all quotes before it are closed.
    ends = np.flatnonzero((data == _NEWLINE) & (np.cumsum(data == _QUOTE) % 2 == 0))
    start = int(ends[-1]) + 1 if len(ends) else 0
    line = 1 + content.count(b"\n", 0, start)
    raise DatasetError(
        f"{path}: a quote in the record that begins in line {line} is never closed, and the "
        f"{content.count(b'\n', start)} line(s) from there on would be one value; close it, or double a "
        "quote that belongs to the text"
    )


def _common_types(tables: Sequence[pa.Table]) -> _Types:
    """Return the narrowest type that holds every value of each column."""
    types: dict[str, pa.DataType] = {}
    for name in tables[0].column_names:
        kinds = {_kind(table.schema.field(name).type) for table in tables} - {pa.null()}
        if kinds == {pa.int64(), pa.float64()}:
            types[name] = pa.float64()
        else:
            types[name] = next(iter(kinds), pa.null()) if len(kinds) < 2 else pa.string()  # noqa: PLR2004
    return types


def _kind(kind: pa.DataType) -> pa.DataType:
    """Return `kind` if filters and text can use it; dates and times stay text."""
    return kind if kind in {pa.null(), pa.int64(), pa.float64(), pa.bool_()} else pa.string()


def _with_lists(table: pa.Table) -> pa.Table:
    """Return the table with list columns where every cell is a list."""
    for place, name in enumerate(table.column_names):
        column = table.column(name)
        if pa.types.is_string(column.type) and column.null_count < len(column):
            lists = _lists(column)
            if lists is not None:
                table = table.set_column(place, name, pa.array(lists, pa.list_(pa.string())))
    return table


def _lists(column: pa.ChunkedArray) -> list[list[str | None] | None] | None:
    lists: list[list[str | None] | None] = []
    for cell in column:
        text = cell.as_py()
        lists.append(None if text is None else _as_list(text))
        if text is not None and lists[-1] is None:
            return None
    return lists


def _as_list(cell: str) -> list[str | None] | None:
    """Return the texts of a list cell, None for other cells."""
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
