"""mllm_shap's own runner over our engine: the values of its own backend, in far fewer forward passes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mllm_shap import ConversationSnapshot, ExplainConfig, ExplainRunner, Message, Role, Turn
from model_kit import WORDS

from mllm_shapx.models.backend import EngineBackend
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.hf_text import HfTextModel


def config(directory: Path, value_fn: str) -> ExplainConfig:
    """Return the settings of an exact game on a model directory."""
    return ExplainConfig.model_validate(
        {
            "backend": {"kind": "transformers", "model_id": str(directory), "options": {"dtype": "float32"}},
            "generation": {"max_new_tokens": 8},
            "explanation": {
                "estimator": "exact",
                "value_fn": value_fn,
                "max_inflight": 64,
                "archive": {"path": ""},
            },
        }
    )


async def explain(directory: Path, value_fn: str, engine: Engine | None) -> Any:
    """Explain one prompt of five words; with the library's own backend when there is no engine."""
    backend = None if engine is None else EngineBackend(engine)
    runner = ExplainRunner(config(directory, value_fn), backend=backend)
    message = Message(role=Role.USER, text=" ".join(WORDS[:5]))
    return await runner.explain(ConversationSnapshot.from_turns((Turn(messages=(message,)),)))


def values_of(output: Any) -> list[float]:
    return [float(value) for value in output.result.values]


def test_values_equal_those_of_the_librarys_backend(model_directory: Callable[[str], Path]) -> None:
    """Text similarity and log-probability games agree, and 32 coalitions take a few batches."""
    directory = model_directory("llama")

    async def main() -> None:
        engine = Engine(HfTextModel.load(directory, dtype="float32", device="cpu"))
        for value_fn in ("tfidf_cosine", "self_logprob"):
            ours = await explain(directory, value_fn, engine)
            library = await explain(directory, value_fn, None)
            np.testing.assert_allclose(values_of(ours), values_of(library), atol=1e-5)
        assert engine.stats.batches <= 8
        await EngineBackend(engine).aclose()

    asyncio.run(main())
