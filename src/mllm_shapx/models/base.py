"""The interface of a loaded model and of the engine that owns it.

A `Model` is synchronous and is called from one thread at a time. An engine batches the prompts of many
concurrent callers. Connectors (`hf_text`, `liquid_audio`, `openai`) implement `Model`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.models.server_budget import Spent
from mllm_shapx.records.answer import Answer as Answer  # noqa: PLC0414 -- part of this seam
from mllm_shapx.records.answer import Ending as Ending  # noqa: PLC0414
from mllm_shapx.records.likelihood import Likelihood as Likelihood  # noqa: PLC0414

EmbeddingMode = Literal["CONTEXTUAL", "STATIC"]
Vector = NDArray[np.float64]
"""Shaped (hidden,)."""


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
    """Given beginning of the answer; not part of `Answer.text`."""
    logprobs: bool = False
    """Whether answers carry the log-probability of each generated token."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The loaded model, as recorded with every result."""

    connector: str
    model_id: str
    revision: str | None
    """Hub commit, or a digest of the directory's files."""
    dtype: str
    """Dtype of the weights in memory, such as `float32`."""
    device: str


@dataclass(frozen=True, slots=True)
class ModelReport:
    """How a loaded model answers. It may grow when longer prompts arrive."""

    notes: tuple[str, ...] = ()
    """Sentences for the user."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings outside the config that decide the answers, as JSON data for `spec.json`."""


class Prompt(Protocol):
    """A conversation encoded for one model."""

    @property
    def length(self) -> int:
        """Return the positions that the prompt takes in the model's context."""


class Model(Protocol):
    """A loaded model. Its methods are called from one thread at a time."""

    @property
    def identity(self) -> ModelIdentity:
        """Return name, revision, dtype and device of the loaded model."""

    @property
    def report(self) -> ModelReport:
        """Return notes on how the model answers. May be called from any thread."""

    @property
    def max_batch_size(self) -> int | None:
        """Return the configured prompts per forward pass, None for `auto`."""

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> Prompt:
        """Encode one conversation. Needs no device and may run beside `answer` in another thread."""

    def answer(self, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Answer one batch, in the order of `prompts`, which come from `encode`.

        `seeds[i]` alone decides the random draws for prompt i, so a sampled answer does not depend on the
        rest of the batch. Greedy decoding ignores it.

        Raises:
            OutOfMemory: When the device cannot hold the batch; no answer is kept, a smaller batch may fit.
        """

    def embed(self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str) -> list[Vector]:
        """Return one vector per answer from the model's own states.

        STATIC takes the input embeddings of `Answer.token_ids`, CONTEXTUAL the model's last hidden states
        over these tokens alone; `reducer` pools the (tokens, hidden) matrix over tokens. An answer without
        tokens gives an empty vector.
        """

    def close(self) -> None:
        """Release the weights."""


@runtime_checkable
class ArrangesBatches(Protocol):
    """A model that knows better than the engine how to make batches of its prompts.

    Without it, prompts are encoded one by one and ordered by length, and any size is tried.
    """

    @property
    def largest_batch(self) -> int:
        """Return the most prompts that `auto` may put into a batch."""

    def batch_key(self, prompt: Any) -> Any:
        """Return the sort key of a waiting prompt; neighbours share a batch."""

    def encode_all(self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding) -> Sequence[Prompt]:
        """Return one prompt per snapshot, equal to that of `encode`."""


@runtime_checkable
class SpeaksAudio(Protocol):
    """A model whose answers may hold audio."""

    def decode_audio(self, answer: Answer) -> tuple[NDArray[np.float32], int] | None:
        """Return mono samples in [-1, 1] and their rate in hertz; None without a decoder or without audio."""


@runtime_checkable
class ReadsLikelihoods(Protocol):
    """A model that reads the probability of given tokens off forward passes (teacher forcing)."""

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` alone, without special tokens, as mllm_shap's backend forces them."""

    def likelihoods(
        self, prompts: Sequence[Any], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        """Return the likelihood of `continuations[i]` (tokens, not empty) after prompt i.

        Raises:
            OutOfMemory: When the device cannot hold the batch.
            RowError: When the model's logits are not numbers.
        """


@dataclass(frozen=True, slots=True)
class Forcing:
    """Prompts, and the tokens that are given after each."""

    snapshots: Sequence[ConversationSnapshot]
    continuations: Sequence[Sequence[int]]
    """Token ids, one continuation per prompt, none empty."""
    decoding: Decoding
    """How the prompts are encoded; of its other settings nothing is used."""
    top_k: int = 0
    """Most probable tokens to return at each place."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done since its start."""

    busy_seconds: float
    """Time in which the model was answering or embedding."""
    batch_size: int
    """Current prompts per batch, or requests in flight."""
    encode_seconds: float = 0.0
    """Time in which prompts were encoded."""
    spent: Spent = field(default_factory=Spent)
    """What was asked of a server."""


class PromptEngine(Protocol):
    """Answers prompts of many concurrent callers with one model; the engine owns the model.

    `engine.Engine` batches them on a device, `server_engine.ServerEngine` sends them to a server.
    """

    @property
    def model(self) -> Model:
        """Return the model."""

    @property
    def stats(self) -> EngineStats:
        """Return what the engine has done since its start."""

    @property
    def waiting_for(self) -> str:
        """Return what the engine waits for, as a sentence; empty while it answers."""

    @property
    def most_rows(self) -> int:
        """Return the rows whose prompts it may be given at the same time, at most."""

    def order(self, snapshot: ConversationSnapshot) -> Any:
        """Return a sort key: prompts are best answered in its order, the smallest first."""

    async def answer(
        self,
        snapshots: Sequence[ConversationSnapshot],
        decoding: Decoding,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer `snapshots`, in their order; `seeds[i]` decides the random draws of snapshot i.

        `on_answer(i, answer)` is called in the caller's event loop as answers come in. Cancelling the call
        drops prompts that have not started.

        Raises:
            ModelError: When a single prompt does not fit in the device's memory, or the engine is closed.
            RowError: When a prompt cannot be encoded, or a server does not take it.
            ServerError: When a server has given no answer for too long, or takes no requests.
            ModelChangedError: When a server has another model than at the start of the study.
            EngineStoppedError: When the engine itself failed, now or at an earlier call.
            Exception: The model's error for a batch with one of these prompts.
        """

    async def embed(self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str) -> list[Vector]:
        """Return one vector per answer from the model's own states (see `Model.embed`).

        Raises:
            ModelError: When the model gives no states.
        """

    async def likelihoods(
        self, forcing: Forcing, on_likelihood: Callable[[int, Likelihood], None] | None = None
    ) -> list[Likelihood]:
        """Return how likely each continuation is after its prompt, in the order of `forcing`.

        `on_likelihood(i, likelihood)` is called in the caller's loop as they come in.

        Raises:
            ModelError: When the model reads no likelihoods, one prompt alone does not fit in the device's
                memory, the model's forward pass does not give its probabilities, or the engine is closed.
            RowError: When a prompt cannot be encoded or leaves no room for its continuation.
        """

    async def aclose(self, *, keep_model: bool = False) -> None:
        """Fail the waiting calls. Close the model, unless `keep_model` keeps it for another engine."""


class EngineStoppedError(RuntimeError):
    """A thread of the engine ended with an unexpected error. No prompt caused it."""


class ServerDiedError(EngineStoppedError):
    """The server that this worker started has ended. Treated like the death of the worker."""


States = NDArray[np.float64]
"""Shaped (tokens, hidden)."""

REDUCERS: dict[str, Callable[[States], Vector]] = {
    "MeanReducer": lambda states: states.mean(axis=0),
    "MaxReducer": lambda states: states.max(axis=0),
    "MinReducer": lambda states: states.min(axis=0),
    "SumReducer": lambda states: states.sum(axis=0),
    "FirstReducer": lambda states: states[0],
    "ZeroReducer": lambda states: states.reshape(-1),
}
"""Config name -> function; `ZeroReducer` flattens."""


def pool(states: States, reducer: str) -> Vector:
    """Return one vector for the states of an answer; empty for no tokens.

    Raises:
        KeyError: When `reducer` is not in `REDUCERS`.
    """
    reduce = REDUCERS[reducer]
    return reduce(states) if len(states) else np.zeros(0)


class OutOfMemory(Exception):  # noqa: N818 -- a condition that the engine handles
    """The device's memory could not hold a batch."""
