"""What the demo is for: its right explanation is known, and the exact values find it."""

import asyncio
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from demo_task import SYSTEM_PROMPT
from mllm_shap import ConversationSnapshot, ExplainConfig, ExplainRunner, Message, Role, TextPart, Turn

from mllm_shapx.config.loading import load_config
from mllm_shapx.models.backend import EngineBackend
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.registry import load_model
from mllm_shapx.planning.sweep import expand

ROOT = Path(__file__).resolve().parents[2]
MOST_PLAYERS = 6
"""Rows with more players are left to `make demo`; these ones are a second's work each."""


def conversation(prompt: str) -> ConversationSnapshot:
    messages = [
        Message(role=Role.SYSTEM, content=(TextPart(SYSTEM_PROMPT),)),
        Message(role=Role.USER, content=(TextPart(prompt),)),
    ]
    return ConversationSnapshot.from_turns(tuple(Turn((message,)) for message in messages))


def explain_config(archive: Path) -> ExplainConfig:
    return ExplainConfig.model_validate(
        {
            "backend": {"kind": "transformers", "model_id": "demo/model"},
            "generation": {"max_new_tokens": 10, "temperature": 0.0},
            "explanation": {
                "estimator": "exact",
                "value_fn": "tfidf_cosine",
                "normalizer": "abs_sum",
                "players": "tokens",
                "max_inflight": 256,
                "plugin_options": {"tokens": {"roles": ["user"]}},
                "archive": {"path": str(archive / "{run_id}")},
            },
        }
    )


def exact_values(prompts: list[str], archive: Path) -> list[tuple[float, ...]]:
    run = expand(load_config(ROOT / "configs" / "demo.json").experiment_set).runs[0]

    async def explain_all() -> list[tuple[float, ...]]:
        backend = EngineBackend(Engine(load_model(run, ROOT / "demo" / "model")))
        try:
            runner = ExplainRunner(explain_config(archive), backend=backend)
            return [(await runner.explain(conversation(prompt))).result.values for prompt in prompts]
        finally:
            await backend.aclose()

    return asyncio.run(explain_all())


def test_planted_word_has_the_largest_exact_value(tmp_path: Path) -> None:
    """mllm_shap's own exact estimator puts the planted word first, by a wide margin."""
    rows: list[dict[str, Any]] = pq.read_table(ROOT / "demo" / "rows.parquet").to_pylist()
    short = [row for row in rows if row["token_count"] <= MOST_PLAYERS]
    found = exact_values([row["prompt"] for row in short], tmp_path)
    assert len(short) >= 5
    for row, values in zip(short, found, strict=True):
        others = [value for index, value in enumerate(values) if index != row["planted_index"]]
        assert values[row["planted_index"]] > 2 * max(others), row["prompt"]
