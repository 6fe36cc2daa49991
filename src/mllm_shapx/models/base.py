"""The seam between explaining and models: what a loaded model is asked and what it answers.

A `Model` is synchronous and owned by one thread; `models.engine` makes it answer many awaiting prompts at
once. Connectors (`hf_text`, `liquid_audio`) implement `Model`; nothing else knows torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
from mllm_shap import ConversationSnapshot, GenerationRecord
from mllm_shap.value.generation_records import generation_record_from_text
from numpy.typing import NDArray

from mllm_shapx.records.likelihood import Likelihood as Likelihood  # noqa: PLC0414 -- part of this seam

EmbeddingMode = Literal["CONTEXTUAL", "STATIC"]
Ending = Literal["refusal", "content_filter", "empty"]
"""What is unusual in how a server ended an answer."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded. Equal for all prompts of one batch."""

    max_new_tokens: int
    text_temperature: float = 0.0
    """0 decodes greedily."""
    text_top_k: int | None = None
    audio_temperature: float | None = None
    audio_top_k: int | None = None
    output_modality: Literal["text", "audio"] = "text"
    assistant_prefill: str | None = None
    """Beginning of the answer that is given rather than generated; not part of `Answer.text`."""
    logprobs: bool = False
    """Whether answers carry the log-probability of each generated token."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What exactly was loaded, as recorded with every result."""

    connector: str
    model_id: str
    revision: str | None
    """Hub commit, or a digest of the directory's files."""
    dtype: str
    """Dtype of the weights in memory, such as `float32`."""
    device: str


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What a loaded model has to say of how it answers. It may grow as longer prompts come."""

    notes: tuple[str, ...] = ()
    """What the user should know, one sentence each."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides its answers beside the study's config, as JSON data for `spec.json`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Generated text tokens, the end token included when it was generated."""
    logprobs: tuple[float, ...] | None = None
    """Natural-log probability of each of `token_ids` before temperature and top-k; None: not asked for."""
    audio_frames: tuple[tuple[int, ...], ...] = ()
    """Generated audio frames, one code per codebook."""
    ending: Ending | None = None
    """What is unusual in how a server ended the answer; None for an end token or the limit of tokens."""
    reasoning: str = ""
    """Reasoning that a server sent apart from the text; it is never scored."""

    def to_record(self) -> GenerationRecord:
        """Return the record that mllm_shap's value functions score.

        Text rows are the hashed whitespace words of the text, as in mllm_shap's own backends; audio rows
        are the frames.
        """
        record = generation_record_from_text(self.text)
        return GenerationRecord(
            text=record.text,
            text_token_rows=record.text_token_rows,
            audio_token_rows=self.audio_frames,
            logprobs=self.logprobs,
            embedding=record.embedding,
            contextual_embedding=record.contextual_embedding,
        )


def ending_of(written: str | None) -> Ending | None:
    """Return the ending that a text names, None for any other text."""
    return next((ending for ending in get_args(Ending) if ending == written), None)


class Prompt(Protocol):
    """A conversation encoded for one model."""

    @property
    def length(self) -> int:
        """Return the positions that the prompt takes in the model's context."""


class Model(Protocol):
    """A loaded model. Its methods are called from one thread at a time."""

    @property
    def identity(self) -> ModelIdentity:
        """Return what was loaded."""

    @property
    def report(self) -> ModelReport:
        """Return what is to be said of how it answers. It may be called from any thread."""

    @property
    def max_batch_size(self) -> int | None:
        """Return the configured prompts per forward pass, None for `auto`."""

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> Prompt:
        """Encode one conversation. Needs no device and may run beside `answer` in another thread."""

    def answer(self, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Answer one batch in one go, in the order of `prompts`, which are what `encode` returned.

        `seeds[i]` alone decides the random draws for prompt i, so that a sampled answer does not hang on
        what else is in the batch; greedy decoding ignores it.

        Raises:
            OutOfMemory: When the device cannot hold the batch; nothing is kept, a smaller one may be tried.
        """

    def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        """Return one vector per answer from the model's own states.

        STATIC takes the input embeddings of `Answer.token_ids`, CONTEXTUAL the last hidden states of the
        model run over them alone; `reducer` pools the (tokens, hidden) matrix over tokens. An answer
        without tokens gives an empty vector.
        """

    def close(self) -> None:
        """Release the weights."""


class OrdersPrompts(Protocol):
    """A model that says which prompts are cheapest together; without it they are batched by length."""

    def batch_key(self, prompt: Any) -> Any:
        """Return what to sort waiting prompts by; neighbours share a batch. Keys compare with each other."""


class BoundsBatches(Protocol):
    """A model that knows beyond which batch size its device gains nothing."""

    @property
    def largest_batch(self) -> int:
        """Return the most prompts that `auto` may put into a batch."""


class EncodesTogether(Protocol):
    """A model that encodes several conversations in less time than one by one."""

    def encode_all(self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding) -> Sequence[Prompt]:
        """Return what `encode` returns for each of `snapshots`."""


class ReadsLikelihoods(Protocol):
    """A model that reads the probability of given tokens off forward passes (teacher forcing)."""

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` alone, without special tokens, as mllm_shap's backend forces them."""

    def likelihoods(
        self, prompts: Sequence[Any], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        """Return how likely `continuations[i]` (tokens, not empty) is behind prompt i; see `Likelihood`.

        Raises:
            OutOfMemory: When the device cannot hold the batch.
            RowError: When the model's logits are not numbers.
        """


class OutOfMemory(Exception):  # noqa: N818 -- it is a condition that the engine handles
    """The device's memory could not hold a batch."""
