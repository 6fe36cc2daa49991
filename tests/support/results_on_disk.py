"""Writes the results of a run without a model: values that depend on a planted word, and noise."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.records.results import (
    ASSISTANT,
    SYSTEM,
    TEXT,
    USER,
    AttributionSummary,
    ConversationEntry,
    SampleResult,
)
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.spec import RESULT_SETTINGS, SELECTED_ROWS, selected_rows
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.summary import RunSummary

WORDS = [
    "please",
    "tell",
    "the",
    "about",
    "quick",
    "garden",
    "stone",
    "silver",
    "under",
    "evening",
    "letter",
    "window",
    "of",
    "and",
]
PLANTED = ("copper", "maple", "harbor", "violin")
NOISE = {"exact": 0.0, "limited_mc_frac0_3": 0.1, "standard_cc_ns32": 0.6}
"""Run of the default study -> standard deviation of its error."""


def planted_word(row_index: int) -> str:
    """Return the word that decides a row's answer."""
    return PLANTED[row_index % len(PLANTED)]


def text_entry(role: int, pieces: Sequence[str], values: Sequence[float | None] | None) -> ConversationEntry:
    """Return an entry of text pieces by one speaker."""
    return ConversationEntry(
        TEXT, (role,) * len(pieces), tuple(pieces), None if values is None else tuple(values)
    )


def make_sample(run_name: str, row_index: int, *, noise: float = 0.0, players: int = 8) -> SampleResult:
    """Return a sample whose planted word has the largest value without noise."""
    draw = random.Random(row_index)
    words = [draw.choice(WORDS) for _ in range(players)]
    position = draw.randrange(players)
    words[position] = planted_word(row_index)
    error = random.Random(f"{run_name} {row_index}")
    exact = [draw.uniform(-0.08, 0.08) + (0.6 if place == position else 0.0) for place in range(players)]
    values = [value + error.gauss(0.0, noise) for value in exact]
    pieces = [word if place == 0 else f" {word}" for place, word in enumerate(words)]
    total = sum(abs(value) for value in values)
    answer = f"You asked about {planted_word(row_index)}."
    return SampleResult(
        run_name=run_name,
        row_index=row_index,
        language=("en", "pl")[row_index % 2],
        original_language="unknown",
        runtime_sec=0.5 + row_index % 3,
        n_calls=2**players if run_name == "exact" else 40,
        model_calls=2**players if run_name == "exact" else 0,
        prompt_texts=("".join(pieces),),
        input_modality="text",
        output_modality="text",
        attr_summary=AttributionSummary(total, 0.0, 1.0, 0.0, players, 0),
        conversation=(
            (text_entry(SYSTEM, ["You are a helpful assistant."], None),),
            (text_entry(USER, pieces, values),),
            (text_entry(ASSISTANT, [answer], None),),
        ),
        base_value=0.0,
        grand_value=sum(exact),
        response=answer,
        seed=1,
        num_players=players,
        values_sum=sum(values),
    )


def make_failure(run_name: str, row_index: int, reason: str, *, quarantined: bool = True) -> FailureRecord:
    """Return a row's failure."""
    return FailureRecord(
        row_index=row_index,
        run_name=run_name,
        reason=reason,
        message=f"row {row_index} failed because of {reason}, as this first line says\nand a second line",
        attempts=3,
        quarantined=quarantined,
        node="node7.cluster",
        worker="worker-2",
        traceback="Traceback ...",
        at=1_700_000_000.0,
    )


def write_study(
    directory: Path,
    rows: Sequence[int] = range(6),
    *,
    runs: Mapping[str, float] = NOISE,
    planned: Sequence[int] | None = None,
    failed: Mapping[str, Mapping[int, str]] | None = None,
    players: int = 8,
    specs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write an experiment set's directory; return it.

    Args:
        directory: The experiment set's directory.
        rows: The rows with a sample, in each run.
        runs: Run name -> noise of its values.
        planned: The rows to explain; None for `rows` and the failed ones.
        failed: Run name -> row -> reason, of quarantined samples.
        players: Words per row.
        specs: Run name -> more of its spec; `result_settings` is added to what is there.
    """
    storage = open_storage(str(directory))
    for name, noise in runs.items():
        records = RunRecords(storage, name)
        given_up = (failed or {}).get(name, {})
        done = [row for row in rows if row not in given_up]
        plan = sorted({*rows, *given_up}) if planned is None else list(planned)
        more = (specs or {}).get(name, {})
        settings = {"explainer_type": name, "budget": {"kind": "all", "value": 1.0}, "connector": "hf_text"}
        records.write_spec(
            {
                "explainer_type": "exact" if name == "exact" else "limited_mc",
                **more,
                RESULT_SETTINGS: {**settings, **more.get(RESULT_SETTINGS, {})},
                SELECTED_ROWS: selected_rows(plan),
                "rows_total": len(plan),
            }
        )
        writer = records.checkpoint_writer(plan)
        summary = RunSummary()
        for row in done:
            sample = make_sample(name, row, noise=noise, players=players)
            records.write_sample(sample)
            writer.complete(row)
            summary.add(sample)
        for row, reason in given_up.items():
            records.write_failure(make_failure(name, row, reason))
            writer.fail(row)
            summary.add_failure()
        writer.write()
        records.write_summary(summary.to_json())
    return directory
