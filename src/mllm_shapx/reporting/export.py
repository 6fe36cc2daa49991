"""The table of a study's values, in memory or as a file: one line for each player of each sample."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.records.results import SampleResult
from mllm_shapx.reporting.output import TableForm, new_output, table_file
from mllm_shapx.reporting.pieces import Piece, prompt_pieces
from mllm_shapx.reporting.reading import open_study

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 1000
"""Samples that are held in memory."""

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

type _Line = tuple[str, int, int, str, str, float, float, str, int, int, float, float, float]


@dataclass(frozen=True, slots=True)
class Exported:
    """The outcome of an export."""

    path: Path
    samples: int
    lines: int
    left_out: int
    """Samples that cannot be read."""

    def to_text(self) -> str:
        """Return a line on the file, and one on the samples that were left out."""
        text = f"{self.path}: {self.lines:,} line(s), one for each player of {self.samples:,} sample(s)"
        if self.left_out:
            text += f"\n{self.left_out:,} sample(s) cannot be read and are left out; `verify` names them"
        return text


def export(
    directory: str, form: TableForm, output: Path | None = None, *, overwrite: bool = False
) -> Exported:
    """Write the table of a study's values to one file, for pandas, R and DuckDB.

    Args:
        directory: An experiment set's directory or one run's.
        form: `csv` (UTF-8, one header line, empty cells for what is not known) or `parquet`.
        output: The file; the experiment set's name in the working directory when None.
        overwrite: Replace a file that is there.

    Raises:
        UsageError: When the directory holds no results, or the file is there or is in that directory.
        StorageError: When the file cannot be written.
    """
    study = open_study(directory)
    output = new_output(study.storage, output, f"{study.folder}.{form}", overwrite=overwrite)
    named = [(run, row) for run in study.runs for row in run.sample_rows]
    readable = (sample for run, row in named if (sample := run.sample(row)) is not None)
    samples = lines = 0
    with table_file(output, form, values_table(())) as write:
        for some in batched(readable, _AT_ONCE):
            table = values_table(some)
            write(table)
            samples += len(some)
            lines += len(table)
    return Exported(output, samples, lines, len(named) - samples)


def values_table(samples: Iterable[SampleResult]) -> "pd.DataFrame":
    """Return the table of some samples, typed also without lines (docs/python.md has its columns)."""
    import pandas as pd

    lines = [line for sample in samples for line in _lines_of(sample)]
    return pd.DataFrame.from_records(lines, columns=list(COLUMNS)).astype(_TYPES)


def _lines_of(sample: SampleResult) -> Iterator[_Line]:
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
        (piece, math.nan if piece.value is None else float(piece.value), float(before))
        for piece, before in zip(pieces, raw, strict=True)
    ]


def encodable(text: str) -> str:
    """Return the text with a question mark for each half of a surrogate pair, which no file can hold."""
    return text.encode(errors="replace").decode()
