"""The `hf_text` connector: any causal language model of transformers, answering text prompts in batches."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mllm_shap import ConversationSnapshot
from mllm_shap.backends._chat import snapshot_has_audio
from numpy.typing import NDArray

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ResourceError, RowError
from mllm_shapx.models.base import (
    Answer,
    Decoding,
    EmbeddingMode,
    Likelihood,
    ModelIdentity,
    ModelReport,
    OutOfMemory,
    pool,
)
from mllm_shapx.models.batch_size import LARGEST_SIZE
from mllm_shapx.models.chat_prompts import ChatPrompts, ChatSettings
from mllm_shapx.models.control_tokens import are_readable
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.devices import free_memory, memory_errors, own_memory, pick_dtype, place_model
from mllm_shapx.models.generation_settings import (
    GENERATION_FILE,
    Vocabulary,
    check_generation_file,
    read_settings,
)
from mllm_shapx.models.hf_loading import TextFiles, load_text
from mllm_shapx.models.likelihood import Likelihoods
from mllm_shapx.models.plain_generate import Generated
from mllm_shapx.models.positions import position_limit
from mllm_shapx.models.reasoning import ReasoningCut, opens_reasoning
from mllm_shapx.models.text_source import split_commit, text_source

MEMORY_SHARE = 0.5
"""Largest share of free main memory for a batch on the CPU: workers share a machine."""
_LOGITS_COPIES = 3
LARGEST_ON_CPU = 256
"""Larger batches are a few percent faster at most on CPUs."""
_LAST = b"\xff" * 4


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A rendered conversation as token ids."""

    token_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids)


class HfTextModel:
    """A causal language model and its tokenizer in memory.

    Prompts are those of the tokenizer's `apply_chat_template` (see `ChatPrompts`). Answers are decoded as in
    mllm_shap's own transformers backend.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        identity: ModelIdentity,
        *,
        max_batch_size: int | None = None,
        chat: ChatSettings | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._identity = identity
        self._max_batch_size = max_batch_size
        self._notes = notes
        # With several devices, the device of the first layers: it takes prompts and returns logits.
        self._device: torch.device = model.device
        # Fast tokenizers are not thread-safe: prompts are encoded while answers are decoded.
        self._decoding_tokenizer = copy.deepcopy(tokenizer)
        self._encoding = threading.Lock()
        chat = ChatSettings() if chat is None else chat
        known = are_readable(tokenizer.name_or_path)
        self._prompts = ChatPrompts(tokenizer, chat, identity.model_id, names_control_tokens=not known)
        self._cut = None
        if chat.strip_reasoning:
            begun = opens_reasoning(self._prompts.generation_prompt())
            self._cut = ReasoningCut(self._decoding_tokenizer, begun=begun)
        self._settings = settings = read_settings(model, tokenizer)
        self._vocabulary = settings.vocabulary
        self._positions = position_limit(model)
        self._rows = model.get_input_embeddings().num_embeddings
        self._position_bytes = _position_bytes(model)
        self.decoder = Decoder(model, settings, self._positions)
        self._likelihoods = Likelihoods(self.decoder)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        max_batch_size: int | None = None,
        model_id: str | None = None,
        recorded_revision: str | None = None,
        files: TextFiles | None = None,
        chat: ChatSettings | None = None,
    ) -> "HfTextModel":
        """Load a model from a hub id at `revision`, or from a directory.

        Args:
            source: Hub id or directory.
            revision: Hub commit to load.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            device: `cuda`, `cuda:1`, `cpu`, `mps`; the best available when None.
            attn_implementation: Attention kernel; the model's default when None.
            max_batch_size: Prompts per batch; None for `auto`.
            model_id: Name recorded with results; `source` when None.
            recorded_revision: Revision recorded with results; `revision` when None.
            files: The exact files, for example with an adapter; those of `source` at `revision` when None.
            chat: Settings of prompts and answer texts; the defaults when None.

        Raises:
            ModelError: When the model cannot be loaded.
            ResourceError: When the machine lacks the device.
        """
        placement = place_model(device)
        weights = pick_dtype(dtype, placement.device)
        identity = ModelIdentity(
            connector="hf_text",
            model_id=model_id or str(source),
            revision=recorded_revision or revision,
            dtype=str(weights).removeprefix("torch."),
            device=str(placement.device),
        )
        try:
            with memory_errors(placement.device):
                files = files or TextFiles(str(source), revision)
                check_generation_file(Path(files.source) / GENERATION_FILE)
                loaded = load_text(files, placement, weights, attn_implementation)
                own_memory(loaded.model)
                return cls(
                    loaded.model,
                    loaded.tokenizer,
                    identity,
                    max_batch_size=max_batch_size,
                    chat=chat,
                    notes=loaded.notes,
                )
        except OutOfMemory as error:
            raise ResourceError(
                f"model {str(source)!r} does not fit on {placement.names} ({error}); use a smaller dtype "
                "(connector_kwargs.dtype), fewer workers per device, or a device with more memory"
            ) from error

    @property
    def identity(self) -> ModelIdentity:
        """Return name, revision, dtype and device of the loaded model."""
        return self._identity

    @property
    def max_batch_size(self) -> int | None:
        """Return the configured prompts per batch, None for `auto`."""
        return self._max_batch_size

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on how this model answers, one sentence each; prompts may add more."""
        return (*self._notes, *self._prompts.notes, *self._settings.notes, *self.decoder.notes)

    @property
    def report(self) -> ModelReport:
        """Return the notes, and the model's own settings that decide its answers."""
        settings = {"generation_config": self._settings.record(), "decoding": self.decoder.way}
        return ModelReport(self.notes, settings)

    @property
    def network(self) -> Any:
        """Return the transformers model, for benchmarks without our code."""
        return self._model

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the tokens that end and pad an answer."""
        return self._vocabulary

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that encodes prompts."""
        return self._tokenizer

    @property
    def largest_batch(self) -> int:
        """Return the most prompts per `auto` batch: CPUs saturate at smaller batches than GPUs."""
        return LARGEST_ON_CPU if self._device.type == "cpu" else LARGEST_SIZE

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> TextPrompt:
        """Render and tokenize one conversation.

        Raises:
            RowError: When it contains audio, the chat template refuses it, or its prompt is empty or too long
                for the model.
        """
        return self.encode_all([snapshot], decoding)[0]

    def encode_all(self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding) -> list[TextPrompt]:
        """Encode several conversations together, which is faster than one at a time (see `encode`)."""
        if any(snapshot_has_audio(snapshot) for snapshot in snapshots):
            raise RowError(
                "audio_input", "connector 'hf_text' takes text only, and this conversation holds audio"
            )
        with self._encoding:
            rows = self._prompts.encode_all(snapshots, decoding.assistant_prefill or "")
        return [self._prompt(ids, decoding) for ids in rows]

    def batch_key(self, prompt: TextPrompt) -> bytes:
        """Return a sort key that groups prompts which are cheap to compute together.

        It sorts by prefix where shared prefixes are computed once, else by length, longest first.
        """
        if self.decoder.shares_beginnings(prompt.length):
            return np.asarray(prompt.token_ids, dtype=">u4").tobytes()
        return _LAST + (2**32 - prompt.length).to_bytes(8)

    def answer(self, prompts: Sequence[TextPrompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Answer one batch, in the order of `prompts`.

        Raises:
            OutOfMemory: When the device cannot hold the batch.
        """
        ids = [prompt.token_ids for prompt in prompts]
        with torch.inference_mode(), memory_errors(self._device):
            self._check_memory(ids, decoding)
            generated = self.decoder.answer(ids, decoding, seeds)
        return self._answers(generated, decoding.assistant_prefill or "")

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` alone (see `ReadsLikelihoods`).

        Raises:
            RowError: When one of them is unknown to the model.
        """
        with self._encoding:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        self._check_known(ids, "the answer")
        return tuple(ids)

    def likelihoods(
        self, prompts: Sequence[TextPrompt], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        """Return the likelihood of `continuations[i]` after prompt i (see `ReadsLikelihoods`)."""
        ids = [prompt.token_ids for prompt in prompts]
        lengths = [len(row) + len(tokens) for row, tokens in zip(ids, continuations, strict=True)]
        width = min(sum(lengths), max(*lengths, self._likelihoods.positions_at_a_time))
        needed = width * (self._position_bytes + 8 * self._rows)
        with torch.inference_mode(), memory_errors(self._device):
            self._refuse_beyond_memory(needed, f"{width} positions of a forward pass")
            return self._likelihoods.read(ids, continuations, top_k)

    def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        """Return one vector per answer: `reducer` of its tokens' states (see `Model.embed`)."""
        filled = [answer.token_ids for answer in answers if answer.token_ids]
        with torch.inference_mode(), memory_errors(self._device):
            states = iter(self._states(filled, mode) if filled else ())
            return [pool(next(states), reducer) if answer.token_ids else np.zeros(0) for answer in answers]

    def close(self) -> None:
        """Release the weights."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _answers(self, generated: Sequence[Generated], prefill: str) -> list[Answer]:
        ids = [each.token_ids for each in generated]
        if self._cut is None:
            texts = self._decoding_tokenizer.batch_decode(ids, skip_special_tokens=True)
        else:
            texts = self._cut.texts(ids, prefill)
        return [
            Answer(
                text=text.strip(),
                token_ids=tuple(each.token_ids),
                logprobs=None if each.logprobs is None else tuple(each.logprobs),
            )
            for text, each in zip(texts, generated, strict=True)
        ]

    def _states(self, answers: Sequence[tuple[int, ...]], mode: EmbeddingMode) -> list[NDArray[np.float64]]:
        """Return each answer's states, (tokens, hidden). Padding comes after the tokens and is masked."""
        longest = max(len(ids) for ids in answers)
        pad, device = self._vocabulary.pad, self._device
        ids = torch.tensor([list(row) + [pad] * (longest - len(row)) for row in answers], device=device)
        if mode == "STATIC":
            states = self._model.get_input_embeddings()(ids)
        else:
            mask = torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in answers], device=device
            )
            output = self._model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            states = output.hidden_states[-1]
        values = states.float().cpu().numpy().astype(np.float64)
        return [values[row, : len(ids)] for row, ids in enumerate(answers)]

    def _prompt(self, ids: list[int], decoding: Decoding) -> TextPrompt:
        if not ids:
            raise RowError(
                "empty_prompt", f"model {self._identity.model_id!r} turned the prompt into no tokens"
            )
        self._check_known(ids, "the prompt")
        self._check_length(len(ids), decoding)
        return TextPrompt(tuple(ids))

    def _check_known(self, ids: Sequence[int], what: str) -> None:
        if ids and max(ids) >= self._rows:
            raise RowError(
                "unknown_token",
                f"{what} holds the token {self._tokenizer.convert_ids_to_tokens(max(ids))!r}, which the "
                f"tokenizer of model {self._identity.model_id!r} knows and the model does not",
            )

    def _check_memory(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
        width = max(map(len, prompts)) + decoding.max_new_tokens
        needed = len(prompts) * (width * self._position_bytes + 4 * _LOGITS_COPIES * self._rows)
        self._refuse_beyond_memory(needed, f"{len(prompts)} prompts of {width} positions")

    def _refuse_beyond_memory(self, needed: int, what: str) -> None:
        """Refuse more bytes than main memory holds: the system would kill the process, not raise."""
        if self._device.type == "cpu" and needed > MEMORY_SHARE * free_memory():
            raise OutOfMemory(f"{what} need {needed / 2**30:.1f} GiB")

    def _check_length(self, length: int, decoding: Decoding) -> None:
        """Refuse prompts beyond the table of learned positions: on a GPU they would crash the process."""
        if self._positions is not None and length + decoding.max_new_tokens - 1 > self._positions:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {length} tokens; with {decoding.max_new_tokens} new ones that is more than "
                f"the {self._positions} positions of model {self._identity.model_id!r}",
            )


def _position_bytes(model: Any) -> int:
    """Return the bytes of keys and values that one position takes over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kept * size * model.dtype.itemsize)


def load(settings: ModelSettings, model_path: Path | None, revision: str | None) -> HfTextModel:
    """Load the model of a run (see `registry.LOADERS`)."""
    options = settings.kwargs
    source = text_source(settings, model_path, None)
    commit, adapter_commit = split_commit(revision or "")
    adapter = source.adapter
    files = TextFiles(
        source.base.source,
        revision=None if source.base.directory is not None else commit or source.base.revision,
        adapter=None if adapter is None else adapter.source,
        adapter_revision=None if adapter is None or adapter.directory is not None else adapter_commit,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
        gguf_file=options.gguf_file,
    )
    return HfTextModel.load(
        files.source,
        dtype=options.dtype,
        device=settings.device,
        attn_implementation=options.attn_implementation,
        max_batch_size=None if options.batch_size == "auto" else options.batch_size,
        model_id=settings.model_id,
        recorded_revision=revision,
        files=files,
        chat=ChatSettings.of(settings),
    )
