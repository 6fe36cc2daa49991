"""One self-contained HTML page of a study's results, to open in any browser or send to anyone."""

import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from mllm_shapx.config.paths import expanded
from mllm_shapx.errors import UsageError
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.reporting.changed_rows import compare_with_dataset
from mllm_shapx.reporting.comparison import MOST_COMPARED, RunFigures, compare_runs, evenly, mixing_notes
from mllm_shapx.reporting.output import refuse_special, write_output
from mllm_shapx.reporting.pieces import Piece, prompt_pieces
from mllm_shapx.reporting.reading import RunFiles, StudyFiles, open_study

MOST_ROWS = 5000
"""Rows in one page; of more, as many evenly spread ones are taken, and the page says so."""

PAGE = "report.html"

_PLACE = "/*DATA*/"
_DIGITS = 5


def report(
    directory: str,
    output: Path | None = None,
    *,
    most_rows: int = MOST_ROWS,
    accept_changed_rows: bool = False,
) -> Path:
    """Write the page and return where it is.

    Args:
        directory: An experiment set's directory or one run's.
        output: The file to write; `report.html` in the directory when None, in the working directory when
            the results are not on this machine.
        most_rows: Rows to put into the page.
        accept_changed_rows: Show samples of rows that were changed in the dataset since.

    Raises:
        UsageError: When the directory is neither, or rows were changed and that is not accepted.
        StorageError: When the file cannot be written.
    """
    study = open_study(directory)
    if not accept_changed_rows:
        _refuse_changed_rows(study)
    if output is None:
        is_local = isinstance(study.storage, LocalStorage)
        output = expanded(directory) / PAGE if is_local else Path(PAGE)
    refuse_special(output)
    write_output(output, page(study, most_rows=most_rows).encode(errors="replace"))
    return output


def _refuse_changed_rows(study: StudyFiles) -> None:
    changes, _ = compare_with_dataset([(run, run.records.read_made_from()) for run in study.runs])
    if changes:
        raise UsageError(
            f"{study.storage.uri}: the dataset was changed since: {'; '.join(changes)}. "
            "Put the dataset back, explain them again with `run --resume --accept-changed-rows`, or show the "
            "samples as they were made with `report --accept-changed-rows`"
        )


def page(study: StudyFiles, *, most_rows: int = MOST_ROWS) -> str:
    """Return the page's HTML."""
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    # In a script element only "<" could end it; the escape means the same to JSON.
    data = json.dumps(_content(study, most_rows), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return template.replace(_PLACE, data.replace("<", "\\u003c"))


def _content(study: StudyFiles, most_rows: int) -> dict[str, Any]:
    answers = _Answers()
    shown = evenly(study.rows, most_rows)
    rows = [row for index in shown if (row := _row(study, index, answers)) is not None]
    figures = compare_runs(study)
    return {
        "title": _title(study),
        "subtitle": f"{len(study.rows):,} rows, {len(study.runs):,} runs · {study.storage.uri}",
        "notes": [*_notes(study, len(shown)), *mixing_notes(figures)],
        "runs": [_run(run, of_run) for run, of_run in zip(study.runs, figures, strict=True)],
        "answers": answers.texts,
        "rows": rows,
    }


class _Answers:
    """Every answer once: most runs of a row have the same."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Return the answer's position in `texts`."""
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]


def _title(study: StudyFiles) -> str:
    named = study.runs[0].spec.get("experiment_set_id")
    return str(named) if named else study.storage.uri.rstrip("/").rpartition("/")[2]


def _notes(study: StudyFiles, shown: int) -> Iterator[str]:
    if shown < len(study.rows):
        yield f"The page holds {shown:,} of {len(study.rows):,} rows, evenly spread."
    if any(len(run.sample_rows) > MOST_COMPARED for run in study.runs):
        yield f"Correlations are over {MOST_COMPARED:,} rows per run, evenly spread."


def _run(run: RunFiles, figures: RunFigures) -> dict[str, Any]:
    summary = run.summary
    has_samples = bool(summary.get("n_samples"))
    return {
        "name": run.name,
        "samples": figures.samples,
        "failed": figures.failed,
        "n_calls": figures.mean_n_calls,
        "model_calls": figures.model_calls,
        "seconds": figures.seconds_per_sample,
        "correlation": figures.correlation,
        "frac_text": summary.get("avg_frac_text") if has_samples else None,
        "frac_audio": summary.get("avg_frac_audio") if has_samples else None,
        "residual": summary.get("efficiency_residual_mean") if has_samples else None,
    }


def _row(study: StudyFiles, index: int, answers: _Answers) -> dict[str, Any] | None:
    """Return a row with each run's values, None when no sample can be read."""
    samples = [run.sample(index) for run in study.runs]
    first = next((sample for sample in samples if sample is not None), None)
    if first is None:
        return None
    prompts: list[list[list[Any]]] = []
    runs = [None if sample is None else _values(sample, prompts, answers) for sample in samples]
    return {"i": index, "l": first.language, "o": first.original_language, "p": prompts, "r": runs}


def _values(sample: SampleResult, prompts: list[list[list[Any]]], answers: _Answers) -> dict[str, Any]:
    """Return a run's part of a row; its prompt is added to `prompts` unless another run has the same."""
    pieces = prompt_pieces(sample)
    prompt = _prompt(pieces)
    if prompt not in prompts:
        prompts.append(prompt)
    return {
        "q": prompts.index(prompt),
        "v": [_rounded(piece.value) for piece in pieces if piece.value is not None],
        "a": answers.place(sample.response),
        "b": _rounded(sample.base_value),
        "g": _rounded(sample.grand_value),
        "n": sample.n_calls,
        "m": sample.model_calls,
        "s": _rounded(sample.runtime_sec),
    }


def _prompt(pieces: Sequence[Piece]) -> list[list[Any]]:
    """Return [text or null for sound, 1 for a player, 1 where a further message begins] for each piece."""
    turns = [piece.turn for piece in pieces]
    begins = [0, *(int(turn != before) for before, turn in pairwise(turns))]
    return [
        [None if piece.num_bytes is not None else piece.text, int(piece.value is not None), begin]
        for piece, begin in zip(pieces, begins, strict=False)
    ]


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")
