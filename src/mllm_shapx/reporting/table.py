"""The table at the end of a run: some prompts with their values, and every run in figures."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.text import Text

from mllm_shapx.plaintext import shown
from mllm_shapx.records.layout import RunLayout
from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.agreement import most_important
from mllm_shapx.reporting.comparison import Mark, RunFigures, compare_runs, evenly, left_out_notes
from mllm_shapx.reporting.grid import cut, grid, names, numbers, text_console
from mllm_shapx.reporting.pieces import Piece, prompt_pieces, rank_of
from mllm_shapx.reporting.progress import is_capable
from mllm_shapx.reporting.reading import RunFiles, StudyFiles, open_study

_INDENT = "  "
_WIDEST_WORD = 20
_MOST_PLAYERS = 60
_RAISES, _LOWERS = "bold black on green", "bold black on yellow"


def wants_color(stream: TextIO) -> bool:
    """Return whether the stream takes colour: it is a capable terminal, and NO_COLOR is not set."""
    return not os.environ.get("NO_COLOR") and is_capable(stream)


def results_table(
    directory: str,
    *,
    marks: Mapping[int, Mark] | None = None,
    rows: Sequence[int] | None = None,
    most_rows: int = 5,
    width: int = 80,
    color: bool = False,
) -> str:
    """Return a study's results as text that is safe to print.

    Args:
        directory: An experiment set's directory or one run's.
        marks: Row index -> the word that is known to matter there; its rank is shown.
        rows: Row indices to show; when None, `most_rows` of those with a sample, evenly spread.
        most_rows: How many rows to show when `rows` is None.
        width: Columns of the terminal; file paths may be longer.
        color: Whether to use terminal colours. The text is the same without.

    Raises:
        UsageError: When the directory is neither.
    """
    study = open_study(directory)
    marks = marks or {}
    chosen = evenly(study.rows, most_rows) if rows is None else rows
    blocks = [_row_block(study, row, marks.get(row), width) for row in chosen]
    blocks.append(_figure_lines(compare_runs(study, marks), width))
    blocks.append([Text(f"{len(study.rows)} row(s), {len(study.runs)} run(s) in {shown(study.storage.uri)}")])
    paragraphs = [Text("\n").join(block) for block in blocks if block]
    console = text_console(width, color=color)
    with console.capture() as capture:
        console.print(Text("\n\n").join(paragraphs), soft_wrap=True)
    return capture.get()


def _row_block(study: StudyFiles, row: int, mark: Mark | None, width: int) -> list[Text]:
    found = [(run, sample) for run in study.runs if (sample := run.sample(row)) is not None]
    if not found:
        return []
    run, sample = found[0]
    language = "" if sample.language == "unknown" else f" · {sample.language}"
    answer = " ".join(sample.response.split()) or "(no text)"
    lines = [
        Text(cut(f"row {row}{language} · values of {run.name}", width), "bold"),
        *_prompt_lines(prompt_pieces(sample), width),
        Text(cut(f"{_INDENT}answer: {answer}", width)),
    ]
    if mark is not None:
        lines.append(Text(cut(_INDENT + _rank_line(mark, found), width)))
    path = study.locate(RunLayout(run.name).sample(row))
    return [*lines, Text(f"{_INDENT}{shown(path)}", "dim")]


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


def _prompt_lines(pieces: Sequence[Piece], width: int) -> list[Text]:
    """Return the prompt with each player's value under it, in as many pairs of lines as it takes."""
    largest = max((abs(piece.value) for piece in pieces if piece.value is not None), default=0.0)
    # Of a long prompt only the pieces with the largest values are shown.
    kept = sorted(most_important([piece.value or 0.0 for piece in pieces], _MOST_PLAYERS))
    strongest = [pieces[position] for position in kept]
    pairs = [(Text(_INDENT), Text(_INDENT))]
    for piece in strongest:
        cell = _cell(piece, largest)
        cells = max(text.cell_len for text in cell)
        used = pairs[-1][0].cell_len
        if used + cells > width and used > len(_INDENT):
            pairs.append((Text(_INDENT), Text(_INDENT)))
        for line, text in zip(pairs[-1], cell, strict=True):
            line.append_text(text).append(" " * (cells + 1 - text.cell_len))
    lines = [line for pair in pairs for line in pair] if pieces else []
    for line in lines:
        line.rstrip()
    if len(strongest) < len(pieces):
        lines.append(Text(f"{_INDENT}(the {len(strongest)} strongest of {len(pieces)} pieces)"))
    return lines


def _cell(piece: Piece, largest: float) -> tuple[Text, Text]:
    """Return a piece and its value; the strongest value is in brackets."""
    word = cut(piece.label, _WIDEST_WORD)
    if piece.value is None:
        return Text(word), Text()
    value = format_value(piece.value, largest)
    if abs(piece.value) == largest > 0.0:
        style = _RAISES if piece.value > 0 else _LOWERS
        return Text(word, style), Text(f"[{value}]", style)
    return Text(word), Text(value, "dim")


def format_value(value: float, largest: float) -> str:
    """Return a value with its sign; a small largest value of the row gives more decimals."""
    if 0.0 < largest < 0.00995:  # noqa: PLR2004 -- three decimals would show one digit of it
        return f"{value:+.0e}"
    decimals = 3 if 0.0 < largest < 0.0995 else 2  # noqa: PLR2004 -- as above
    return f"{value:+.{decimals}f}" if round(value, decimals) else f"{0.0:.{decimals}f}"


def _figure_lines(figures: Sequence[RunFigures], width: int) -> list[Text]:
    rows = [[_cell_of(read(run), form) for _, _, read, form in _FIGURES] for run in figures]
    # A column without a figure in any row is left out.
    kept = [n for n in range(len(_FIGURES)) if any(row[n] not in {"-", "0"} for row in rows)]
    columns = [*names("run"), *numbers(*(_FIGURES[n][0] for n in kept))]
    cells = [[run.name, *(row[n] for n in kept)] for run, row in zip(figures, rows, strict=True)]
    header, *lines = grid(columns, cells, width)
    legend = [f"{_INDENT}{_FIGURES[n][0]}: {_FIGURES[n][1]}" for n in kept if _FIGURES[n][1]]
    lines += [cut(line, width) for line in legend]
    notes = map(shown, left_out_notes(figures))
    return [Text(header, "bold"), *map(Text, [*lines, *notes])]


def _cell_of(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    if form == "count":
        form = ",.0f" if value >= 100.0 or value == int(value) else ".1f"  # noqa: PLR2004
    return format(value, form)


_FIGURES: tuple[tuple[str, str, Callable[[RunFigures], float | None], str], ...] = (
    ("samples", "", lambda run: run.samples, ","),
    ("failed", "", lambda run: run.failed, ","),
    ("n_calls", "coalitions evaluated per sample", lambda run: run.mean_n_calls, "count"),
    (
        "sure",
        "share of samples that reached the standard error of stop_when",
        lambda run: run.share_sure,
        ".0%",
    ),
    ("generated", "answers that the model gave for this run in all", lambda run: run.model_calls, "count"),
    ("s each", "seconds per sample", lambda run: run.seconds_per_sample, ",.2f"),
    (
        "r exact",
        "correlation with the values of the exact run, mean over rows",
        lambda run: run.agreement.pearson,
        ".3f",
    ),
    ("first", "share of rows whose marked word has the largest value", lambda run: run.marked_first, ".0%"),
    (
        "deleted",
        "area under the value as the highest values are deleted: small is good",
        lambda run: run.deletion_area,
        ".3f",
    ),
    (
        "kept",
        "area under the value as the highest values are kept: large is good",
        lambda run: run.insertion_area,
        ".3f",
    ),
    ("random", "both areas for players in a random order", lambda run: run.random_area, ".3f"),
)
"""Title, explanation, figure and its format; `count` has a decimal below 100."""
