"""A study's plots and its table of errors as files for a paper (`report --figures`)."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.reporting.charts import PAPER, charts
from mllm_shapx.reporting.html import refuse_changed_rows
from mllm_shapx.reporting.output import refuse_inside, write_output
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.reporting.study_figures import ErrorRow, study_figures

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = {
    "group": "run",
    "estimator": None,
    "seeds": None,
    "rows": "samples",
    "n_calls": "coalitions",
    "error": "error",
    "error_sd": "sd",
    "error_low": None,
    "error_high": None,
    "pearson": "r",
    "spearman": "rank r",
    "top": "top 3",
    "same_first": "first",
    "sign_changes": "signs",
}
"""Columns of the errors -> their titles in the LaTeX table; None for those of the CSV file alone."""

_CAPTION = (
    "Errors against the exact values. Error: mean over players of the absolute difference, averaged over "
    "samples, with its standard deviation; r and rank r: correlation; top 3 and first: share of the three "
    "most important players, and of the most important one, that agree; signs: share of players whose sign "
    "differs."
)


def write_figures(directory: str, folder: Path, *, accept_changed_rows: bool = False) -> list[Path]:
    """Write each plot as SVG and PDF, and the errors as CSV and LaTeX; return the files.

    Files of the same names are replaced. Without an exact run there are no errors to write.

    Raises:
        UsageError: When the directory holds no results, `folder` is in it, or vl-convert is not installed.
        StorageError: When a file cannot be written.
    """
    study = open_study(directory)
    refuse_inside(study.storage, folder)
    if not accept_changed_rows:
        refuse_changed_rows(study)
    figures = study_figures(study)
    contents: dict[str, bytes] = {}
    for chart in charts(figures, PAPER):
        contents[f"{chart.name}.svg"] = chart.svg().encode()
        contents[f"{chart.name}.pdf"] = chart.pdf()
    if errors := figures.errors():
        table = _table(errors)
        contents["errors.csv"] = table.to_csv(index=False, lineterminator="\n").encode(errors="replace")
        contents["errors.tex"] = _latex(table).encode(errors="replace")
    for name, content in contents.items():
        write_output(folder / name, content)
    return [folder / name for name in contents]


def _table(errors: list[ErrorRow]) -> "pd.DataFrame":
    import pandas as pd

    rows = [{**asdict(row), **asdict(row.found), "error": row.found.difference} for row in errors]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"error_sd": float})


def _latex(table: "pd.DataFrame") -> str:
    """Return a table for the package booktabs."""
    titles = {name: title for name, title in _COLUMNS.items() if title is not None}
    shown = table[list(titles)].set_axis(list(titles.values()), axis="columns")
    text: str = shown.to_latex(
        index=False,
        escape=True,
        na_rep="--",
        float_format="%.3f",
        caption=_CAPTION,
        label="tab:errors",
        column_format="l" + "r" * (len(titles) - 1),
    )
    return f"% \\usepackage{{booktabs}}\n{text}"
