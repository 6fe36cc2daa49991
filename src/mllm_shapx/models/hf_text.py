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
    States,
    Vector,
    pool,
)
from mllm_shapx.models.batch_size import LARGEST_SIZE
from mllm_shapx.models.chat_prompts import ChatPrompts
from mllm_shapx.models.control_tokens import are_readable
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.devices import (
    free_memory,
    loaded_identity,
    memory_errors,
    own_memory,
    pick_dtype,
    place_model,
)
from mllm_shapx.models.generation_settings import GENERATION_FILE, check_generation_file, read_settings
from mllm_shapx.models.hf_loading import LoadedText, TextFiles, load_text
from mllm_shapx.models.likelihood import Likelihoods
from mllm_shapx.models.plain_generate import Generated
from mllm_shapx.models.positions import position_limit
from mllm_shapx.models.reasoning import ReasoningCut, opens_reasoning

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

    def __init__(self, loaded: LoadedText, settings: ModelSettings, identity: ModelIdentity) -> None:
        self.network = model = loaded.model
        """The transformers model."""
        self.tokenizer = tokenizer = loaded.tokenizer
        self.identity = identity
        self.max_batch_size = None if settings.kwargs.batch_size == "auto" else settings.kwargs.batch_size
        self._notes = loaded.notes
        # With several devices, the device of the first layers: it takes prompts and returns logits.
        self._device: torch.device = model.device
        # Fast tokenizers are not thread-safe: prompts are encoded while answers are decoded.
        self._decoding_tokenizer = copy.deepcopy(tokenizer)
        self._encoding = threading.Lock()
        known = are_readable(tokenizer.name_or_path)
        self._prompts = ChatPrompts(tokenizer, settings, names_control_tokens=not known)
        self._cut = None
        if settings.kwargs.strip_reasoning:
            begun = opens_reasoning(self._prompts.generation_prompt())
            self._cut = ReasoningCut(self._decoding_tokenizer, begun=begun)
        self.settings = read_settings(model, tokenizer)
        """The settings of the model's own generation config."""
        self._positions = position_limit(model)
        self._rows = model.get_input_embeddings().num_embeddings
        self._position_bytes = _position_bytes(model)
        self.decoder = Decoder(model, self.settings, self._positions)
        self._likelihoods = Likelihoods(self.decoder)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on how this model answers, one sentence each; prompts may add more."""
        return (*self._notes, *self._prompts.notes, *self.settings.notes, *self.decoder.notes)

    @property
    def report(self) -> ModelReport:
        """Return the notes, and the model's own settings that decide its answers."""
        settings = {"generation_config": self.settings.record(), "decoding": self.decoder.way}
        return ModelReport(self.notes, settings)

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
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        self._check_known(ids, "the answer")
        return tuple(ids)

    def likelihoods(
        self, prompts: Sequence[TextPrompt], continuations: Sequence[Sequence[int]], top_k: int
    ) -> list[Likelihood]:
        """Return the likelihood of `continuations[i]` after prompt i (see `ReadsLikelihoods`)."""
        ids = [prompt.token_ids for prompt in prompts]
        lengths = [len(row) + len(tokens) for row, tokens in zip(ids, continuations, strict=True)]
        width = min(sum(lengths), max(*lengths, self._likelihoods.most_nodes))
        needed = width * (self._position_bytes + 8 * self._rows)
        with torch.inference_mode(), memory_errors(self._device):
            self._refuse_beyond_memory(needed, f"{width} positions of a forward pass")
            return self._likelihoods.read(ids, continuations, top_k)

    def embed(self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str) -> list[Vector]:
        """Return one vector per answer: `reducer` of its tokens' states (see `Model.embed`)."""
        filled = [answer.token_ids for answer in answers if answer.token_ids]
        with torch.inference_mode(), memory_errors(self._device):
            states = iter(self._states(filled, mode) if filled else ())
            return [pool(next(states), reducer) if answer.token_ids else np.zeros(0) for answer in answers]

    def close(self) -> None:
        """Release the weights."""
        self.network = None
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

    def _states(self, answers: Sequence[tuple[int, ...]], mode: EmbeddingMode) -> list[States]:
        """Return each answer's states, (tokens, hidden). Padding comes after the tokens and is masked."""
        longest = max(len(ids) for ids in answers)
        pad, device = self.settings.pad, self._device
        ids = torch.tensor([list(row) + [pad] * (longest - len(row)) for row in answers], device=device)
        if mode == "STATIC":
            states = self.network.get_input_embeddings()(ids)
        else:
            mask = torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in answers], device=device
            )
            output = self.network(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            states = output.hidden_states[-1]
        values = states.float().cpu().numpy().astype(np.float64)
        return [values[row, : len(ids)] for row, ids in enumerate(answers)]

    def _prompt(self, ids: list[int], decoding: Decoding) -> TextPrompt:
        if not ids:
            raise RowError(
                "empty_prompt", f"model {self.identity.model_id!r} turned the prompt into no tokens"
            )
        self._check_known(ids, "the prompt")
        self._check_length(len(ids), decoding)
        return TextPrompt(tuple(ids))

    def _check_known(self, ids: Sequence[int], what: str) -> None:
        if ids and max(ids) >= self._rows:
            raise RowError(
                "unknown_token",
                f"{what} holds the token {self.tokenizer.convert_ids_to_tokens(max(ids))!r}, which the "
                f"tokenizer of model {self.identity.model_id!r} knows and the model does not",
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
                f"the {self._positions} positions of model {self.identity.model_id!r}",
            )


def _position_bytes(model: Any) -> int:
    """Return the bytes of keys and values that one position takes over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kept * size * model.dtype.itemsize)


def load(settings: ModelSettings, model_path: Path | None, revision: str | None) -> HfTextModel:
    """Load the model of a run (see `registry.LOADERS`).

    Raises:
        ModelError: When the model cannot be loaded.
        ResourceError: When the machine lacks the device, or the model does not fit on it.
    """
    options = settings.kwargs
    files = TextFiles.of(settings, model_path, revision)
    placement = place_model(settings.device)
    dtype = pick_dtype(options.dtype, placement.device)
    try:
        with memory_errors(placement.device):
            check_generation_file(Path(files.source) / GENERATION_FILE)
            loaded = load_text(files, placement, dtype, options.attn_implementation)
            own_memory(loaded.model)
            return HfTextModel(loaded, settings, loaded_identity(settings, revision, dtype, placement.device))
    except OutOfMemory as error:
        raise ResourceError(
            f"model {files.source!r} does not fit on {placement.names} ({error}); use a smaller dtype "
            "(connector_kwargs.dtype), fewer workers per device, or a device with more memory"
        ) from error
