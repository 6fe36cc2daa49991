"""The demo's model as a generator that remembers: a prompt is answered once per test session."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from explaining_kit import likelihood, row_of
from mllm_shap import ConversationSnapshot
from mllm_shap.domain.generation import ForcedScore

from mllm_shapx.config.loading import load_config
from mllm_shapx.explaining.coalitions import Keep, RowCoalitions
from mllm_shapx.explaining.sample import explain_run
from mllm_shapx.explaining.settings import decoding
from mllm_shapx.explaining.similarity import Vector
from mllm_shapx.models.base import Answer
from mllm_shapx.models.registry import load_model
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.results import SampleResult

DEMO = Path(__file__).resolve().parents[2] / "demo"


@cache
def demo_rows() -> list[dict[str, Any]]:
    """Return the demo's rows: `prompt`, `planted_index` and more."""
    return list(pq.read_table(DEMO / "rows.parquet").to_pylist())


class DemoModel:
    """The demo's model and what it has answered."""

    def __init__(self) -> None:
        config = load_config(DEMO.parent / "configs" / "demo.json")
        run = expand(config.experiment_set, str(config.path)).runs[0]
        self._model = load_model(run.model_settings, DEMO / "model", "demo", config.path)
        self._how = replace(decoding(run), logprobs=True)
        self._known: dict[str, Answer] = {}

    def explain(self, run: RunSpec, coalitions: RowCoalitions, row_index: int) -> SampleResult:
        """Explain one demo row."""
        row = row_of(demo_rows()[row_index]["prompt"], row_index=row_index)

        async def generate(prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
            new = [each for each in prompts.values() if each.snapshot_id not in self._known]
            for start in range(0, len(new), 64):
                some = new[start : start + 64]
                encoded = [self._model.encode(each, self._how) for each in some]
                answers = self._model.answer(encoded, self._how, [0] * len(some))
                self._known.update(zip((each.snapshot_id for each in some), answers, strict=True))
            for mask, each in prompts.items():
                keep(mask, self._known[each.snapshot_id])

        async def embed(answers: Sequence[Answer]) -> list[Vector]:
            return self._model.embed(answers, run.shap.mode, run.shap.reducer)

        async def force(
            masks: Sequence[int], answers: Sequence[Answer], top_k: int
        ) -> list[tuple[ForcedScore, ...]]:
            return [
                tuple(likelihood(coalitions.render(mask), answer.text, top_k) for answer in answers)
                for mask in masks
            ]

        return asyncio.run(explain_run(row, coalitions, run, generate, embed, force=force))
