"""The table at the end of a run: some prompts with their values, and every run in figures."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.cells import cell_len

from mllm_shapx.plaintext import shown
from mllm_shapx.records.layout import RunLayout
from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.comparison import Mark, RunFigures, compare_runs, evenly, left_out_notes
from mllm_shapx.reporting.grid import Column, cut, grid
from mllm_shapx.reporting.pieces import Piece, prompt_pieces, rank_of
from mllm_shapx.reporting.reading import RunFiles, StudyFiles, open_study

_INDENT = "  "
_WIDEST_WORD = 20
_MOST_PLAYERS = 60
_RESET, _BOLD, _DIM, _RISING, _FALLING = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[1;30;42m", "\x1b[1;30;43m"


def wants_color(stream: TextIO) -> bool:
    """Return whether colour belongs on the stream: a capable terminal, and no NO_COLOR."""
    is_capable = os.environ.get("TERM", "").lower() not in {"", "dumb", "unknown"}
    return not os.environ.get("NO_COLOR") and not stream.closed and stream.isatty() and is_capable


def results_table(
    directory: str,
    *,
    marks: Mapping[int, Mark] | None = None,
    rows: Sequence[int] | None = None,
    most_rows: int = 5,
    width: int = 80,
    color: bool = False,
) -> str:
    """Return a readable picture of a study's results.

    Args:
        directory: An experiment set's directory or one run's.
        marks: Row index -> the word that is known to matter there; its rank is shown.
        rows: Row indices to show; when None, `most_rows` of those with a sample, evenly spread.
        most_rows: How many rows to show when `rows` is None.
        width: Columns of the terminal; file paths may be longer.
        color: Whether to highlight with terminal colours; without, only the brackets tell.

    Raises:
        UsageError: When the directory is neither.
    """
    study = open_study(directory)
    marks = marks or {}
    chosen = evenly(study.rows, most_rows) if rows is None else rows
    blocks = [_row_block(study, row, marks.get(row), width, color=color) for row in chosen]
    paragraphs = ["\n".join(block) for block in blocks if block]
    figures = compare_runs(study, marks)
    paragraphs.append("\n".join([*_figure_lines(figures, width, color=color), *left_out_notes(figures)]))
    paragraphs.append(f"{len(study.rows)} row(s), {len(study.runs)} run(s) in {shown(study.storage.uri)}")
    return "\n\n".join(paragraphs) + "\n"


def _row_block(study: StudyFiles, row: int, mark: Mark | None, width: int, *, color: bool) -> list[str]:
    found = [(run, sample) for run in study.runs if (sample := run.sample(row)) is not None]
    if not found:
        return []
    run, sample = found[0]
    language = "" if sample.language == "unknown" else f" · {sample.language}"
    head = cut(f"row {row}{language} · values of {run.name}", width)
    lines = [_styled(head, _BOLD, color=color), *_prompt_lines(prompt_pieces(sample), width, color=color)]
    answer = " ".join(sample.response.split()) or "(no text)"
    lines.append(cut(f"{_INDENT}answer: {answer}", width))
    if mark is not None:
        lines.append(cut(_INDENT + _rank_line(mark, found), width))
    path = study.locate(RunLayout(run.name).sample(row))
    return [*lines, _styled(f"{_INDENT}{shown(path)}", _DIM, color=color)]


def _rank_line(mark: Mark, found: Sequence[tuple[RunFiles, SampleResult]]) -> str:
    ranks = [rank_of(mark.word, prompt_pieces(sample)) for _, sample in found]
    said = f"{mark.column} “{mark.word}”: "
    if ranks[0] is None:
        return said + "no player of the prompt"
    said += f"rank {ranks[0][0]} of {ranks[0][1]} in {found[0][0].name}"
    if len(found) > 1:
        first = sum(rank is not None and rank[0] == 1 for rank in ranks)
        said += f"; rank 1 in {first} of {len(found)} runs"
    return said


def _prompt_lines(pieces: Sequence[Piece], width: int, *, color: bool) -> list[str]:
    """Return the prompt with each player's value under it, in as many pairs of lines as it takes."""
    values = [piece.value for piece in pieces if piece.value is not None]
    largest = max((abs(value) for value in values), default=0.0)
    strongest = _strongest(pieces)
    cells = [_cell(piece, largest, color=color) for piece in strongest]
    lines: list[str] = []
    for first, last in _breaks([cell[2] for cell in cells], width - len(_INDENT)):
        lines.append(_INDENT + " ".join(cell[0] for cell in cells[first:last]).rstrip())
        lines.append(_INDENT + " ".join(cell[1] for cell in cells[first:last]).rstrip())
    if len(strongest) < len(pieces):
        lines.append(f"{_INDENT}(the {len(strongest)} strongest of {len(pieces)} pieces)")
    return lines


def _strongest(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces in their order, of a long prompt only the ones with the largest values."""
    order = sorted(range(len(pieces)), key=lambda position: -abs(pieces[position].value or 0.0))
    kept = set(order[:_MOST_PLAYERS])
    return [piece for position, piece in enumerate(pieces) if position in kept]


def _cell(piece: Piece, largest: float, *, color: bool) -> tuple[str, str, int]:
    """Return a piece, its value and the width of both; the strongest value stands in brackets."""
    word = cut(piece.label, _WIDEST_WORD)
    is_strongest = piece.value is not None and abs(piece.value) == largest > 0.0
    value = "" if piece.value is None else format_value(piece.value, largest)
    value = f"[{value}]" if is_strongest else value
    cells = max(cell_len(word), cell_len(value))
    styles = ("", _DIM)
    if is_strongest and piece.value is not None:
        styles = (_RISING, _RISING) if piece.value > 0 else (_FALLING, _FALLING)
    over, under = (
        # Blanks stay outside the style, so that the end of a line can lose them.
        _styled(text, style, color=color) + " " * (cells - cell_len(text))
        for text, style in zip((word, value), styles, strict=True)
    )
    return over, under, cells


def format_value(value: float, largest: float) -> str:
    """Return a value with its sign, with as many decimals as the row's largest value calls for."""
    if 0.0 < largest < 0.00995:  # noqa: PLR2004 -- three decimals would show one digit of it
        return f"{value:+.0e}"
    decimals = 3 if 0.0 < largest < 0.0995 else 2  # noqa: PLR2004 -- as above
    return f"{value:+.{decimals}f}" if round(value, decimals) else f"{0.0:.{decimals}f}"


def _breaks(widths: Sequence[int], available: int) -> list[tuple[int, int]]:
    """Return the first and the last position (excluded) of each line."""
    lines: list[tuple[int, int]] = []
    start, used = 0, -1
    for position, cells in enumerate(widths):
        if used + 1 + cells > available and position > start:
            lines.append((start, position))
            start, used = position, -1
        used += 1 + cells
    return [*lines, (start, len(widths))] if widths else lines


def _figure_lines(figures: Sequence[RunFigures], width: int, *, color: bool) -> list[str]:
    columns = [Column("run", shrinks=True), *(Column(title, right=True) for title, _, _ in _FIGURES)]
    rows = [[run.name, *(read(run) for _, _, read in _FIGURES)] for run in figures]
    # A column that says nothing in any row is left out.
    kept = [0, *(n for n in range(1, len(columns)) if any(row[n] not in {"-", "0"} for row in rows))]
    columns = [columns[position] for position in kept]
    rows = [[row[position] for position in kept] for row in rows]
    header, *lines = grid(columns, rows, width)
    return [_styled(header, _BOLD, color=color), *lines, *_legend(columns, width)]


def _legend(columns: Sequence[Column], width: int) -> list[str]:
    present = {column.title for column in columns}
    return [
        cut(f"{_INDENT}{title}: {meaning}", width)
        for title, meaning, _ in _FIGURES
        if meaning and title in present
    ]


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100.0 or value == int(value) else f"{value:.1f}"  # noqa: PLR2004


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_FIGURES: tuple[tuple[str, str, Callable[[RunFigures], str]], ...] = (
    ("samples", "", lambda run: f"{run.samples:,}"),
    ("failed", "", lambda run: f"{run.failed:,}"),
    ("n_calls", "coalitions evaluated per sample", lambda run: _count(run.mean_n_calls)),
    (
        "sure",
        "share of samples that reached the standard error of stop_when",
        lambda run: _number(run.share_sure, ".0%"),
    ),
    ("generated", "answers that the model gave for this run in all", lambda run: _count(run.model_calls)),
    ("s each", "seconds per sample", lambda run: _number(run.seconds_per_sample, ",.2f")),
    (
        "r exact",
        "correlation with the values of the exact run, mean over rows",
        lambda run: _number(run.agreement.pearson, ".3f"),
    ),
    (
        "first",
        "share of rows whose marked word has the largest value",
        lambda run: _number(run.marked_first, ".0%"),
    ),
    (
        "deleted",
        "area under the value as the highest values are deleted: small is good",
        lambda run: _number(run.deletion_area, ".3f"),
    ),
    (
        "kept",
        "area under the value as the highest values are kept: large is good",
        lambda run: _number(run.insertion_area, ".3f"),
    ),
    ("random", "both areas for players in a random order", lambda run: _number(run.random_area, ".3f")),
)
"""Title, meaning where the title does not say it, and how a run's cell reads."""


def _styled(text: str, style: str, *, color: bool) -> str:
    return f"{style}{text}{_RESET}" if color and style and text else text
