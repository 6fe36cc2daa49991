"""mllm_shap's backend protocol over an engine, so that its `ExplainRunner` uses our models as they are."""

import dataclasses
import hashlib

from mllm_shap import ConversationSnapshot, GenerationRecord
from mllm_shap.domain.config import GenerationConfig

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.engine import Engine


class EngineBackend:
    """A `GenerativeBackend` and `SupportsLogprobs` over an engine.

    Give the runner a `max_inflight` of several batches: prompts that await together share a forward pass.

    Args:
        engine: Answers the prompts; closed by `aclose`.
        reducer: Pools an answer's states when the config asks for embeddings.
        assistant_prefill: Beginning of the answer that is given to the model.
        seed: Decides, with the prompt, the draws of sampled answers.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        reducer: str = "MeanReducer",
        assistant_prefill: str | None = None,
        seed: int = 0,
    ) -> None:
        self._engine = engine
        self._reducer = reducer
        self._prefill = assistant_prefill
        self._seed = seed

    @property
    def model_id(self) -> str:
        """Return the identifier of the loaded model."""
        return self._engine.model.identity.model_id

    @property
    def returns_logprobs(self) -> bool:
        """Say that records carry the log-probabilities of their tokens."""
        return True

    async def generate(
        self, snapshot: ConversationSnapshot, generation: GenerationConfig
    ) -> GenerationRecord:
        """Answer one conversation, together with those that await at the same time."""
        decoding = Decoding(
            max_new_tokens=generation.max_new_tokens,
            text_temperature=generation.temperature,
            text_top_k=generation.top_k or None,
            assistant_prefill=self._prefill,
            logprobs=True,
        )
        answers = await self._engine.answer([snapshot], decoding, [self._seed_for(snapshot)])
        record = answers[0].to_record()
        if not generation.compute_embeddings:
            return record
        static = await self._engine.embed(answers, "STATIC", self._reducer)
        contextual = await self._engine.embed(answers, "CONTEXTUAL", self._reducer)
        return dataclasses.replace(
            record,
            embedding=tuple(static[0].tolist()),
            contextual_embedding=tuple(contextual[0].tolist()),
        )

    async def aclose(self) -> None:
        """Close the engine and its model."""
        await self._engine.aclose()

    def _seed_for(self, snapshot: ConversationSnapshot) -> int:
        text = "\0".join(f"{message.role.value}\0{message.text}" for message in snapshot.messages())
        digest = hashlib.blake2b(f"{self._seed}\0{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")
