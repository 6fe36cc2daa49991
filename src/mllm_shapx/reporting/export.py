"""A study's values as one CSV or Parquet file, for pandas, R and DuckDB (`export`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

from mllm_shapx.reporting.output import TableForm, new_output, table_file
from mllm_shapx.reporting.reading import StudyFiles, open_study
from mllm_shapx.reporting.values_table import Line, lines_of, table_of

_AT_ONCE = 50_000
"""Lines that are held in memory."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    path: Path
    samples: int
    lines: int
    left_out: int
    """Samples that cannot be read."""

    def to_text(self) -> str:
        """Return what was written in one line, and what was left out in another."""
        text = f"{self.path}: {self.lines:,} line(s), one for each player of {self.samples:,} sample(s)"
        if self.left_out:
            text += f"\n{self.left_out:,} sample(s) cannot be read and are left out; `verify` names them"
        return text


def export(
    directory: str, form: TableForm, output: Path | None = None, *, overwrite: bool = False
) -> Exported:
    """Write the table of a study's values, which `values_table` describes.

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
    lines = _Lines(study)
    with table_file(output, form, table_of(())) as write:
        for some in batched(lines, _AT_ONCE):
            write(table_of(some))
    return Exported(output, lines.samples, lines.count, lines.left_out)


class _Lines(Iterable[Line]):
    """The lines of all samples, counted as they are read."""

    def __init__(self, study: StudyFiles) -> None:
        self._study = study
        self.samples = self.count = self.left_out = 0

    def __iter__(self) -> Iterator[Line]:
        for run in self._study.runs:
            for row in run.sample_rows:
                sample = run.sample(row)
                if sample is None:
                    self.left_out += 1
                    continue
                self.samples += 1
                for line in lines_of(sample):
                    self.count += 1
                    yield line
