"""A model made of rules, and runs to explain it with."""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

from mllm_shap import ConversationSnapshot, GenerationRecord
from mllm_shap.domain.generation import ForcedScore
from mllm_shap.value.generation_records import generation_record_from_text

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.data.conversations import Row
from mllm_shapx.explaining.coalitions import Keep, RowCoalitions
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.similarity import Embedder
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.results import SampleResult

WORDS = ["red", "fox", "jumps", "over", "lazy", "dogs", "near", "old", "stone", "bridge", "today", "again"]


def answer_text(snapshot: ConversationSnapshot) -> str:
    """Answer with a few words that depend on the words of the prompt and their order."""
    user = " ".join(message.text for message in snapshot.messages() if message.role.value == "user")
    words = user.split()
    said = [word for word in words if len(word) % 2 == 0] or ["nothing"]
    digest = hashlib.sha256(user.encode()).digest()
    return " ".join([*said, f"tail{digest[0] % 3}"])


def likelihood(snapshot: ConversationSnapshot, text: str, top_k: int) -> ForcedScore:
    """Return made-up scores of `text` that depend on the prompt, one per word."""
    prompt = " ".join(message.text for message in snapshot.messages())
    digest = hashlib.sha256(f"{prompt}\0{text}".encode()).digest()
    count = len(text.split())
    logprobs = tuple(-0.1 - digest[place] / 100 for place in range(count))
    ids = tuple(tuple(range(top_k)) for _ in range(count))
    shares = tuple(tuple(-1.5 - digest[place] / 90 - rank for rank in range(top_k)) for place in range(count))
    return ForcedScore(logprobs, ids, shares)


class RuleBackend:
    """The rules as mllm_shap's backend."""

    model_id = "rules"

    async def generate(self, snapshot: ConversationSnapshot, generation: object) -> GenerationRecord:
        del generation
        return generation_record_from_text(answer_text(snapshot))


class Generator:
    """The rules as our generator; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def __call__(self, prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
        for mask, snapshot in prompts.items():
            self.asked.append(mask)
            keep(mask, Answer(answer_text(snapshot)))


def runs_of(*experiments: dict[str, Any], **config: Any) -> tuple[RunSpec, ...]:
    """Return the runs of a config on the rules' model."""
    base: dict[str, Any] = {
        "experiment_set_id": "test",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": "rules"},
        "dataset": {"source": "local_parquet", "path": "rows.parquet"},
        "generation": {"text_temperature": 0.0},
        "experiments": list(experiments),
    }
    return expand(ExperimentSet.model_validate(base | config)).runs


def row_of(*texts: str, row_index: int = 0) -> Row:
    nothing = (None,) * len(texts)
    return Row(row_index, texts, nothing, nothing, "en", "unknown")


async def no_embedding(answers: object) -> list[Any]:
    raise AssertionError(f"nobody should embed {answers}")


def explain(
    row: Row,
    run: RunSpec,
    coalitions: RowCoalitions | None = None,
    generator: Generator | None = None,
    embed: Embedder = no_embedding,
) -> SampleResult:
    return asyncio.run(
        explain_run(row, coalitions or open_row(row, run), run, generator or Generator(), embed)
    )
