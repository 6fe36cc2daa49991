"""Prompts coloured by their values, as HTML: a table's cells, or a page of their own."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from mllm_shapx.errors import ShapxError
from mllm_shapx.records.results import USER, ConversationEntry, SampleResult
from mllm_shapx.records.runs import RunRecords

_POSITIVE, _NEGATIVE = "214, 69, 65", "49, 116, 181"
"""Red, green and blue of the background of the largest value."""
_SOUND = "♪"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One sample for a table of prompts."""

    row_index: int
    language: str
    prompt: str
    """HTML: the user's pieces, coloured by value."""
    answer: str
    """The model's answer, plain text."""
    recordings: tuple[str, ...]
    """Sound files of the prompt, below the run's directory."""
    spoken_answer: str | None
    """The sound file of the answer, None where there is none."""


def prompt_rows(records: RunRecords, most: int) -> Iterator[PromptRow]:
    """Yield the first `most` readable samples of a run, in the order of their rows."""
    found = 0
    for row in records.sample_rows():
        if found >= most:
            return
        try:
            sample = records.read_sample(row)
        except (OSError, ValueError, ShapxError):
            continue
        found += 1
        recordings, spoken = _sounds(sample)
        yield PromptRow(row, sample.language, coloured(sample), sample.response, recordings, spoken)


def coloured(sample: SampleResult) -> str:
    """Return the prompt of a sample as HTML: red raises and blue lowers, hovering shows the number."""
    values = [abs(value) for value in sample.player_values() if value is not None]
    largest = max(values, default=0.0)
    turns = []
    for turn in sample.conversation:
        pieces = [piece for entry in turn if USER in entry.roles for piece in _pieces(entry, largest)]
        if pieces:
            turns.append("".join(pieces))
    return f'<div style="white-space: pre-wrap">{"<br>".join(turns)}</div>'


def page(title: str, rows: list[PromptRow]) -> str:
    """Return a page with one line a sample."""
    lines = "".join(
        f"<tr><td>{row.row_index}</td><td>{html.escape(row.language)}</td><td>{row.prompt}</td>"
        f"<td>{html.escape(row.answer)}</td></tr>"
        for row in rows
    )
    head = "<tr><th>row</th><th>language</th><th>prompt</th><th>answer</th></tr>"
    style = "body{font-family:sans-serif}td,th{padding:.3em .8em;text-align:left;vertical-align:top}"
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<table>{head}{lines}</table></body></html>"
    )


def _pieces(entry: ConversationEntry, largest: float) -> Iterator[str]:
    values = entry.shap_values or (None,) * len(entry.content)
    for piece, value in zip(entry.content, values, strict=True):
        text = html.escape(piece if isinstance(piece, str) else f"{piece.text or _SOUND} ")
        if value is None:
            yield text
            continue
        share = abs(value) / largest if largest > 0.0 else 0.0
        colour = _POSITIVE if value >= 0.0 else _NEGATIVE
        yield f'<span title="{value:+.4g}" style="background: rgba({colour}, {share:.2f})">{text}</span>'


def _sounds(sample: SampleResult) -> tuple[tuple[str, ...], str | None]:
    artifacts = sample.audio_artifacts or {}
    inputs = artifacts.get("inputs") or []
    answer = artifacts.get("answer") or {}
    named = [each.get("path") for each in inputs if isinstance(each, dict)]
    spoken = answer.get("path") if isinstance(answer, dict) else None
    return tuple(path for path in named if _is_sound(path)), spoken if _is_sound(spoken) else None


def _is_sound(path: object) -> TypeGuard[str]:
    """Whether a path that a sample names is a sound file of its run."""
    parts = path.split("/") if isinstance(path, str) else []
    return parts[:1] == ["audio"] and ".." not in parts and parts[-1].endswith(".wav")
