"""Plain text in columns that fit a width; for terminals and pipes alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from mllm_shapx.plaintext import printable

_ELLIPSIS = "…"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a grid."""

    title: str
    right: bool = False
    """Whether cells are aligned to the right."""
    shrinks: bool = False
    """Whether the column gives way, with an ellipsis, when the grid is too wide."""


def grid(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, gap: int = 2) -> list[str]:
    """Return the header and one line per row, none longer than `width` cells.

    Columns that may shrink share what is missing, the widest giving first; where that is not enough, lines
    are cut at the end.
    """
    table = [[column.title for column in columns], *[[_one_line(cell) for cell in row] for row in rows]]
    widths = [max(cell_len(row[position]) for row in table) for position in range(len(columns))]
    _shrink(widths, columns, width - gap * (len(columns) - 1))
    return [cut(_line(columns, row, widths, gap), width) for row in table]


def cut(text: str, width: int) -> str:
    """Return the text in at most `width` cells, with an ellipsis where something was cut off."""
    text = _one_line(text)
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + _ELLIPSIS


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Return the text filled with blanks to `width` cells, aligned to the right or to the left."""
    blanks = " " * max(0, width - cell_len(text))
    return blanks + text if right else text + blanks


def _one_line(text: str) -> str:
    return printable(text.replace("\n", " ").replace("\t", " "))


def _shrink(widths: list[int], columns: Sequence[Column], available: int) -> None:
    least = {position: max(8, cell_len(column.title)) for position, column in enumerate(columns)}
    while sum(widths) > available:
        willing = [p for p, column in enumerate(columns) if column.shrinks and widths[p] > least[p]]
        if not willing:
            return
        widest = max(willing, key=lambda position: widths[position])
        widths[widest] -= 1


def _line(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int], gap: int) -> str:
    cells = [
        pad(cut(cell, widths[position]), widths[position], right=columns[position].right)
        for position, cell in enumerate(row)
    ]
    return (" " * gap).join(cells).rstrip()
