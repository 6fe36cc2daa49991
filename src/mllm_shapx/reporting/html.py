"""One self-contained HTML page of a study's results, to open in any browser or send to anyone."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mllm_shapx.config.paths import expanded
from mllm_shapx.errors import UsageError
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.reporting.agreement import TOP_K, mean, summary
from mllm_shapx.reporting.changed_rows import compare_with_dataset
from mllm_shapx.reporting.charts import INSTALL, can_draw, charts
from mllm_shapx.reporting.charts import PAGE as PAGE_THEME
from mllm_shapx.reporting.comparison import evenly
from mllm_shapx.reporting.output import PAGE, refuse_inside, refuse_special, write_output
from mllm_shapx.reporting.page_audio import MOST_SOUND, Recordings
from mllm_shapx.reporting.page_rows import PageRows
from mllm_shapx.reporting.reading import RunFiles, StudyFiles, open_study
from mllm_shapx.reporting.study_figures import RunSeries, StudyFigures, StudyRows, unreadable_notes

MOST_ROWS = 5000
"""Most rows in one page. Of a larger study the page has evenly spread rows, and says so."""

MOST_DATA = 20_000_000
"""About the most bytes of prompts, values and answers in one page: of long rows it has fewer."""

_PROBED = 32
"""Number of rows from which the size of all rows is estimated."""


@dataclass(frozen=True, slots=True)
class PageSettings:
    """The content of a page."""

    most_rows: int = MOST_ROWS
    most_sound: int = MOST_SOUND
    """Bytes of recordings."""
    title: str | None = None
    """The experiment set's name when None."""
    subtitle: str | None = None
    """The directory when None."""
    names: Sequence[str] | None = None
    """Names that the page gives to the runs; their own names when None."""
    pairs: Sequence[Mapping[str, Any]] = ()
    """Rows of a table of compared runs (`compare`)."""
    top_k: int = TOP_K
    """Number of most important players in that table."""
    notes: Sequence[str] = ()
    """Sentences at the beginning."""
    side_by_side: bool = False
    """Whether all runs of a row are shown at first."""


def report(
    directory: str,
    output: Path | None = None,
    *,
    settings: PageSettings | None = None,
    accept_changed_rows: bool = False,
) -> Path:
    """Write the page and return where it is.

    Args:
        directory: An experiment set's directory or one run's.
        output: The file to write; `report.html` in the directory when None, in the working directory when
            the results are not on this machine.
        settings: The content of the page.
        accept_changed_rows: Show samples of rows that have changed in the dataset.

    Raises:
        UsageError: When the directory is neither, `output` would replace another of its files, or rows have
            changed and that is not accepted.
        StorageError: When the file cannot be written.
    """
    study = open_study(directory)
    if output is None:
        is_local = isinstance(study.storage, LocalStorage)
        output = expanded(directory) / PAGE if is_local else Path(PAGE)
    refuse_special(output)
    refuse_inside(study.storage, output, is_page=True)
    if not accept_changed_rows:
        refuse_changed_rows(study)
    write_output(output, page(study, settings).encode(errors="replace"))
    return output


def refuse_changed_rows(study: StudyFiles) -> None:
    """Refuse samples of rows that have changed in the dataset.

    Raises:
        UsageError: When there are such samples; the message names them.
    """
    changes, _ = compare_with_dataset([(run, run.records.read_made_from()) for run in study.runs])
    if changes:
        raise UsageError(
            f"{study.storage.uri}: the dataset was changed since: {'; '.join(changes)}. "
            "Put the dataset back, explain them again with `run --resume --accept-changed-rows`, or show the "
            "samples as they were made with `report --accept-changed-rows`"
        )


def page(study: StudyFiles, settings: PageSettings | None = None) -> str:
    """Return the page's HTML."""
    from jinja2 import Environment, PackageLoader

    content, figures = _content(study, settings or PageSettings())
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # In a script element only "<" could end it; the escape means the same to JSON.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    plots = charts(figures, PAGE_THEME) if can_draw() else []
    folder = resources.files(__package__).joinpath("page")
    templates = Environment(
        loader=PackageLoader("mllm_shapx.reporting", "page"), autoescape=True, keep_trailing_newline=True
    )
    return templates.get_template("report.html").render(
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        script=folder.joinpath("report.js").read_text(encoding="utf-8"),
        plots=[(chart, _inline(chart.svg(), chart.title)) for chart in plots],
        data=data,
    )


def _inline(drawn: str, title: str) -> str:
    """Return an SVG document as an element of the page."""
    tag, rest = drawn.split(">", 1)
    tag = re.sub(r' (?:xmlns(?::\w+)?|version|class)="[^"]*"', "", tag)
    name = html.escape(title, quote=True)
    return tag.replace("<svg", f'<svg class="plot" role="group" aria-label="{name}"', 1) + ">" + rest


def _content(study: StudyFiles, settings: PageSettings) -> tuple[dict[str, Any], StudyFigures]:
    names = settings.names or [run.name for run in study.runs]
    recordings = Recordings(settings.most_sound)
    rows, figures = PageRows(study.runs, recordings), StudyFigures(study, names)
    shown = evenly(study.rows, min(settings.most_rows, _rows_that_fit(study)))
    wanted, samples_of = frozenset(shown), StudyRows(study)
    made = []
    for index, samples in samples_of:
        figures.add(samples)
        if index in wanted and (row := rows.row(index, samples)) is not None:
            made.append(row)
    unreadable = unreadable_notes(dict(zip(names, samples_of.unreadable, strict=True)))
    notes = [*settings.notes, *_notes(study, len(shown), figures), *(f"{note}." for note in unreadable)]
    place = settings.subtitle or study.storage.uri
    return {
        "title": settings.title or str(study.runs[0].spec.get("experiment_set_id") or study.folder),
        "subtitle": f"{len(study.rows):,} row(s), {len(study.runs):,} run(s) · {place}",
        "notes": [*notes, *recordings.notes()],
        "runs": [_run(run, series) for run, series in zip(study.runs, figures.runs, strict=True)],
        "pairs": [dict(pair) for pair in settings.pairs],
        "top_k": settings.top_k,
        "side": settings.side_by_side,
        "answers": list(rows.answers),
        "recordings": recordings.entries,
        "rows": made,
    }, figures


def _rows_that_fit(study: StudyFiles) -> int:
    """Return the number of rows that a page has room for, estimated from some rows."""
    probe, samples_of = PageRows(study.runs, Recordings(0)), StudyRows(study)
    probed = evenly(study.rows, _PROBED)
    found = [probe.row(index, samples_of.read(index)) for index in probed]
    size = len(json.dumps([found, list(probe.answers)], ensure_ascii=False).encode(errors="replace"))
    return max(1, int(MOST_DATA / (size / max(1, len(probed)))))


def _notes(study: StudyFiles, shown: int, figures: StudyFigures) -> list[str]:
    notes = []
    if shown < len(study.rows):
        notes.append(
            f"The page holds {shown:,} of {len(study.rows):,} rows, evenly spread; "
            "tables and plots are of all."
        )
    for run in figures.runs:
        notes += [f"{run.name}: {said}." for said in summary(run.tally).left_out_in_words("exact")]
    if any(run.tally.agreements for run in figures.runs):
        notes.append(
            "Error: mean over players of the difference from the exact value. Same first: share of rows "
            "whose value of largest size belongs to the same player as in the exact run; top 3 shared: share "
            "of the three largest. Signs changed: share of players, positive in one, negative in the other."
        )
    if any(run.stop_at is not None for run in study.runs):
        notes.append(
            "Sure enough: share of samples whose sampling stopped because every standard error is at most "
            "what stop_when asks for; on the others the budget was spent first."
        )
    if not can_draw():
        notes.append(f"There are no plots: they need the package vl-convert-python ({INSTALL}).")
    return notes


def _run(run: RunFiles, series: RunSeries) -> dict[str, Any]:
    residual = run.summary.get("efficiency_residual_mean")
    found = summary(series.tally)
    return {
        "name": series.name,
        "samples": len(series.n_calls),
        "failed": len(run.records.quarantined_rows()),
        "n_calls": mean(series.n_calls),
        "stop_at": run.stop_at,
        "sure": run.share_sure,
        # The older runner does not say which answers were generated for a run.
        "model_calls": None if run.is_of_older_runner or not series.model_calls else sum(series.model_calls),
        "seconds": mean(series.seconds),
        "error": found.difference,
        "correlation": found.pearson,
        "spearman": found.spearman,
        "top": found.top,
        "same_first": found.same_first,
        "sign_changes": found.sign_changes,
        "frac_text": mean(series.text),
        "frac_audio": mean(series.audio),
        "residual": residual if run.summary.get("n_samples") else None,
        "deletion": run.summary.get("deletion_area_mean"),
        "insertion": run.summary.get("insertion_area_mean"),
        "random": run.summary.get("random_area_mean"),
    }
