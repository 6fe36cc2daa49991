"""The table of a study's values: one line for each player of each sample."""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.pieces import Piece, prompt_pieces

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "run",
    "row",
    "position",
    "piece",
    "modality",
    "value",
    "raw_value",
    "language",
    "turn",
    "n_calls",
    "base_value",
    "grand_value",
    "standard_error",
)
"""Columns of the table, in order."""

_TYPES = {
    **dict.fromkeys(("row", "position", "turn", "n_calls"), "int64"),
    **dict.fromkeys(("value", "raw_value", "base_value", "grand_value", "standard_error"), "float64"),
}

type Line = tuple[str, int, int, str, str, float, float, str, int, int, float, float, float]
"""One line of the table."""


def values_table(samples: Iterable[SampleResult]) -> "pd.DataFrame":
    """Return the table of some samples (docs/python.md has its columns)."""
    return table_of(line for sample in samples for line in lines_of(sample))


def table_of(lines: Iterable[Line]) -> "pd.DataFrame":
    """Return some lines as a table with the columns' types, also where there are none."""
    import pandas as pd

    return pd.DataFrame.from_records(list(lines), columns=list(COLUMNS)).astype(_TYPES)


def lines_of(sample: SampleResult) -> Iterator[Line]:
    """Yield one line for each player of a sample."""
    players = players_of(sample)
    errors = sample.standard_errors
    if errors is None or len(errors) != len(players):
        errors = (math.nan,) * len(players)
    for position, ((piece, value, raw), error) in enumerate(zip(players, errors, strict=True)):
        yield (
            sample.run_name,
            sample.row_index,
            position,
            encodable(piece.text.strip()),
            piece.modality,
            value,
            raw,
            encodable(sample.language),
            piece.turn,
            sample.n_calls,
            sample.base_value,
            sample.grand_value,
            error,
        )


def players_of(sample: SampleResult) -> list[tuple[Piece, float, float]]:
    """Return each player with its value and its value before the normalizer, NaN where that is not known."""
    pieces = [piece for piece in prompt_pieces(sample) if piece.value is not None]
    raw = sample.raw_values
    if raw is None or len(raw) != len(pieces):
        raw = (math.nan,) * len(pieces)
    return [
        (piece, float("nan" if piece.value is None else piece.value), float(before))
        for piece, before in zip(pieces, raw, strict=True)
    ]


def encodable(text: str) -> str:
    """Return the text with a question mark for each half of a surrogate pair, which no file can hold."""
    return text.encode(errors="replace").decode()
