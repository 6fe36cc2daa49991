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
from mllm_shap.backends._chat import snapshot_has_audio, snapshot_to_chat_messages
from mllm_shap.backends.transformers.chat import render_prompt
from numpy.typing import NDArray

from mllm_shapx.errors import ModelError, ResourceError, RowError
from mllm_shapx.models.base import Answer, Decoding, EmbeddingMode, ModelIdentity, OutOfMemory
from mllm_shapx.models.batch_size import LARGEST_SIZE
from mllm_shapx.models.decoder_choice import choose_decoder
from mllm_shapx.models.devices import free_memory, memory_errors, pick_device, pick_dtype
from mllm_shapx.models.plain_generate import Generated, Vocabulary
from mllm_shapx.models.pooling import pool
from mllm_shapx.planning.runs import RunSpec

MEMORY_SHARE = 0.5
"""Share of the free main memory that a batch on the CPU may take: workers share a machine."""
_LOGITS_COPIES = 3
LARGEST_ON_CPU = 256
"""Beyond it processors gain a few percent at most, and the clock of a shared machine cannot see them."""
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

    Prompts are rendered and encoded, and answers decoded, as mllm_shap's own transformers backend does it,
    so that in float32 both give the same texts.
    """

    def __init__(
        self, model: Any, tokenizer: Any, identity: ModelIdentity, *, max_batch_size: int | None = None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._identity = identity
        self._max_batch_size = max_batch_size
        # Fast tokenizers are not thread-safe, and prompts are encoded while answers are decoded.
        self._decoding_tokenizer = copy.deepcopy(tokenizer)
        self._encoding = threading.Lock()
        self._vocabulary = Vocabulary(eos=tokenizer.eos_token_id, pad=_padding(model, tokenizer))
        self._positions = _learned_positions(model)
        self._rows = model.get_input_embeddings().num_embeddings
        self._position_bytes = _position_bytes(model)
        self.decoder = choose_decoder(model, self._vocabulary)

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
    ) -> "HfTextModel":
        """Load a model from a hub id at `revision`, or from a directory.

        Args:
            source: Hub id or directory.
            revision: Hub commit to load.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            device: `cuda`, `cuda:1`, `cpu`, `mps`; the best there is when None.
            attn_implementation: Attention kernel; the model's default when None.
            max_batch_size: Prompts per batch; None for `auto`.
            model_id: Name recorded with results; `source` when None.
            recorded_revision: Revision recorded with results; `revision` when None.

        Raises:
            ModelError: When it cannot be loaded.
            ResourceError: When the device is not there.
        """
        place = pick_device(device)
        weights = pick_dtype(dtype, place)
        identity = ModelIdentity(
            connector="hf_text",
            model_id=model_id or str(source),
            revision=recorded_revision or revision,
            dtype=str(weights).removeprefix("torch."),
            device=str(place),
        )
        try:
            with memory_errors(place):
                tokenizer, model = _load(str(source), revision, place, weights, attn_implementation)
                return cls(model, tokenizer, identity, max_batch_size=max_batch_size)
        except OutOfMemory as error:
            raise ResourceError(
                f"model {str(source)!r} does not fit on {place} ({error}); use a smaller dtype "
                "(connector_kwargs.dtype), fewer workers per device, or a device with more memory"
            ) from error

    @property
    def identity(self) -> ModelIdentity:
        """Return what was loaded."""
        return self._identity

    @property
    def max_batch_size(self) -> int | None:
        """Return the configured prompts per batch, None for `auto`."""
        return self._max_batch_size

    @property
    def network(self) -> Any:
        """Return the transformers model itself, for measuring it without all that is built around it."""
        return self._model

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the tokens that end and pad an answer."""
        return self._vocabulary

    @property
    def largest_batch(self) -> int:
        """Return the most prompts that `auto` may put into a batch: processors are busy long before GPUs."""
        return LARGEST_ON_CPU if self._model.device.type == "cpu" else LARGEST_SIZE

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> TextPrompt:
        """Render and tokenize one conversation.

        Raises:
            RowError: When it holds audio, its prompt is empty, or it is longer than the model can read.
        """
        return self.encode_all([snapshot], decoding)[0]

    def encode_all(self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding) -> list[TextPrompt]:
        """Encode several conversations in one go, which costs less than one at a time (see `encode`)."""
        if any(snapshot_has_audio(snapshot) for snapshot in snapshots):
            raise RowError(
                "audio_input", "connector 'hf_text' takes text only, and this conversation holds audio"
            )
        prefill = decoding.assistant_prefill or ""
        messages = [snapshot_to_chat_messages(snapshot) for snapshot in snapshots]
        with self._encoding:
            texts = [render_prompt(self._tokenizer, each) + prefill for each in messages]
            rows = self._tokenizer(texts, add_special_tokens=True, return_attention_mask=False)["input_ids"]
        return [self._prompt(ids, decoding) for ids in rows]

    def batch_key(self, prompt: TextPrompt) -> bytes:
        """Order prompts so that those which cost least together come together.

        That is by their beginnings where these are computed once, else by length, the longest first.
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
        with torch.inference_mode(), memory_errors(self._model.device):
            self._check_memory(ids, decoding)
            generated = self.decoder.answer(ids, decoding, seeds)
        return self._answers(generated)

    def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        """Return one vector per answer: `reducer` over its tokens' states (see `Model.embed`)."""
        filled = [answer.token_ids for answer in answers if answer.token_ids]
        with torch.inference_mode(), memory_errors(self._model.device):
            states = iter(self._states(filled, mode) if filled else ())
            return [pool(next(states), reducer) if answer.token_ids else np.zeros(0) for answer in answers]

    def close(self) -> None:
        """Release the weights."""
        device = self._model.device
        self._model = None
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _answers(self, generated: Sequence[Generated]) -> list[Answer]:
        ids = [each.token_ids for each in generated]
        texts = self._decoding_tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Answer(
                text=text.strip(),
                token_ids=tuple(each.token_ids),
                logprobs=None if each.logprobs is None else tuple(each.logprobs),
            )
            for text, each in zip(texts, generated, strict=True)
        ]

    def _states(self, answers: Sequence[tuple[int, ...]], mode: EmbeddingMode) -> list[NDArray[np.float64]]:
        """Return each answer's states, (tokens, hidden). Padding stands behind the tokens: unseen."""
        longest = max(len(ids) for ids in answers)
        pad, device = self._vocabulary.pad, self._model.device
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
        self._check_length(len(ids), decoding)
        return TextPrompt(tuple(ids))

    def _check_memory(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
        """Refuse a batch that main memory would not hold: the system would kill the process, not raise."""
        if self._model.device.type != "cpu":
            return
        width = max(map(len, prompts)) + decoding.max_new_tokens
        needed = len(prompts) * (width * self._position_bytes + 4 * _LOGITS_COPIES * self._rows)
        if needed > MEMORY_SHARE * free_memory():
            raise OutOfMemory(f"{len(prompts)} prompts of {width} positions need {needed / 2**30:.1f} GiB")

    def _check_length(self, length: int, decoding: Decoding) -> None:
        """Refuse what runs past a table of learned positions: on a GPU that would break the whole process."""
        if self._positions is not None and length + decoding.max_new_tokens > self._positions:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {length} tokens; with {decoding.max_new_tokens} new ones that is more than "
                f"the {self._positions} positions of model {self._identity.model_id!r}",
            )


def _load(
    source: str, revision: str | None, device: torch.device, dtype: torch.dtype, attention: str | None
) -> tuple[Any, Any]:
    import transformers

    # Several workers share a terminal: the bars of all of them at once cannot be read.
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
        # Straight to the device: main memory need not hold the weights of every worker.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, device_map=str(device), **options
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        # Tokenizers and safetensors raise types of their own, plain Exception among them.
        raise ModelError(
            f"connector 'hf_text' cannot load model {source!r}: {str(error).strip() or repr(error)}; "
            "connector_kwargs.model_id must name a causal language model that transformers can load: "
            "a hub id, or a directory with config.json, the weights (*.safetensors) and the tokenizer"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.eval()


def _learned_positions(model: Any) -> int | None:
    """Return the size of the model's table of learned positions; None when it has none."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    # OPT-like tables hold two more rows than positions.
    sizes = {table.num_embeddings for table in tables if table is not words}
    return limit if sizes & {limit, limit + 2} else None


def _position_bytes(model: Any) -> int:
    """Return the bytes of keys and values that one position takes over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kept * size * model.dtype.itemsize)


def _padding(model: Any, tokenizer: Any) -> int:
    """Return a token to fill up with. It is masked, but some tokenizers pad with one that the model lacks."""
    rows = model.get_input_embeddings().num_embeddings
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in candidates if each is not None and each < rows), 0)


def load(run: RunSpec, model_path: Path | None, revision: str | None) -> HfTextModel:
    """Load the model of a run (see `registry.LOADERS`)."""
    options = run.connector_kwargs
    return HfTextModel.load(
        run.model_id if model_path is None else model_path,
        revision=revision if model_path is None else None,
        dtype=options.dtype,
        device=run.device,
        attn_implementation=options.attn_implementation,
        max_batch_size=None if options.batch_size == "auto" else options.batch_size,
        model_id=run.model_id,
        recorded_revision=revision,
    )
