"""Tables of plain text that fit a width, laid out by rich; for terminals and pipes alike."""

import io
import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mllm_shapx.plaintext import shown

_GAP = 2
"""Blanks between two columns."""
_BREAKS = re.compile("[\n\t\u2028\u2029]")
_LEAST = 8
"""Cells that a column of names keeps."""


def numbers(*titles: str) -> list[Column]:
    """Return columns of numbers, aligned to the right."""
    return [Column(title, justify="right", no_wrap=True) for title in titles]


def words(*titles: str) -> list[Column]:
    """Return columns of text that is never shortened."""
    return [Column(title, no_wrap=True) for title in titles]


def names(*titles: str) -> list[Column]:
    """Return columns of text that is shortened, with an ellipsis, where the table is too wide."""
    return [Column(title) for title in titles]


def grid(columns: Iterable[Column], rows: Iterable[Sequence[str]], width: int) -> list[str]:
    """Return the header and one line per row, none longer than `width` cells.

    Columns of names are shortened first. Where that is not enough, lines are cut at the end.
    """
    table = Table(*columns, box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="none")
    for row in rows:
        table.add_row(*map(_line, row))
    for column in table.columns:
        widest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        column.min_width = widest if column.no_wrap else min(widest, _LEAST)
    least = sum((column.min_width or 0) + _GAP for column in table.columns) - _GAP
    console = text_console(max(width, least))
    with console.capture() as capture:
        console.print(table)
    return [cut(line.rstrip(), width) for line in capture.get().splitlines()]


def cut(text: str, width: int) -> str:
    """Return the text in one line of at most `width` cells, with an ellipsis where something was cut off."""
    line = _line(text)
    line.truncate(max(1, width), overflow="ellipsis")
    return line.plain.rstrip()


def text_console(width: int, *, color: bool = False) -> Console:
    """Return a console whose output is captured, the same whatever the environment says of terminals."""
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        force_jupyter=False,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
    )


def _line(text: str) -> Text:
    return Text(shown(_BREAKS.sub(" ", text)), no_wrap=True, overflow="ellipsis")
