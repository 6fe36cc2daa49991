"""Samples and directories for the tests of records."""

from pathlib import Path
from typing import Any

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
from mllm_shapx.records.spec import selected_rows
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.records.summary import RunSummary


def make_sample(row_index: int, run_name: str = "exact", **changes: Any) -> SampleResult:
    """Return a sample of three words whose values satisfy every axiom."""
    values = (0.5 + row_index / 1000, -0.25, 0.125)
    scale = sum(abs(value) for value in values)
    normalized = tuple(value / scale for value in values)
    fields: dict[str, Any] = {
        "run_name": run_name,
        "row_index": row_index,
        "language": "en" if row_index % 2 else "pl",
        "original_language": "unknown",
        "runtime_sec": 0.1 * (row_index + 1),
        "n_calls": 8,
        "model_calls": 8,
        "prompt_texts": ("say a blue word",),
        "input_modality": "text",
        "output_modality": "text",
        "attr_summary": AttributionSummary(sum(abs(value) for value in normalized), 0.0, 1.0, 0.0, 3, 0),
        "conversation": (
            (ConversationEntry(TEXT, (SYSTEM,), ("You help.",), None),),
            (ConversationEntry(TEXT, (USER,) * 3, ("say ", "blue ", "word"), normalized),),
            (ConversationEntry(TEXT, (ASSISTANT,), ("blue",), None),),
        ),
        "base_value": 0.1,
        "grand_value": 0.1 + sum(values),
        "response": "blue",
        "seed": 7,
        "num_players": 3,
        "values_sum": sum(values),
    }
    return SampleResult(**{**fields, **changes})


def make_finished_run(root: Path, rows: list[int], run_name: str = "exact") -> RunRecords:
    """Write a complete and valid run of `rows`."""
    records = RunRecords(LocalStorage(root), run_name)
    writer = records.checkpoint_writer(rows)
    summary = RunSummary()
    records.write_spec(
        {
            "run_name": run_name,
            "result_settings": {"explainer_type": "exact", "shap": {"normalizer": "AbsSumNormalizer"}},
            "selected_rows": selected_rows(rows),
        }
    )
    for row in rows:
        sample = make_sample(row, run_name)
        records.write_sample(sample)
        summary.add(sample)
        writer.complete(row)
    writer.write()
    records.write_summary(summary.to_json())
    return records


def files_below(root: Path) -> dict[str, bytes]:
    """Return every file in a folder's tree with its bytes."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }
