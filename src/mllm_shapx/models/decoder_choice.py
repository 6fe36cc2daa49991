"""Which way of decoding a loaded model can take, found by trying it against the model's own `generate`.

Architectures are too many to list: a cache of another kind, masks of another shape, positions that are not
passed on. What is tried is what counts: the same two prompts, alone and in one batch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.decoding import OwnLoop
from mllm_shapx.models.devices import devices_of
from mllm_shapx.models.plain_generate import (
    Generated,
    Vocabulary,
    generate,
    generate_alike,
    left_padded,
)

_log = logging.getLogger(__name__)

STEPS = 3
"""Tokens generated in the trial."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Largest mean difference of logits, in their standard deviations, that is rounding."""
MASKED = {"sdpa", "eager"}
"""Attention kernels that take a mask of any shape."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Config keys that bound how far attention looks back, in some layers at least."""
_HANDLED = frozenset(
    {
        *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("top_h", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "early_stopping", "length_penalty"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "transformers_version", "_from_model_config"),
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
        "output_hidden_states",
    }
)
"""Generation settings that the own loop implements, or that change no answer of it."""
_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """How one model answers batches."""

    model: Any
    vocabulary: Vocabulary
    own: OwnLoop | None
    """The own loop, where it gives what `generate` gives."""
    window: int | None
    """Positions up to which all layers see everything, which is what the own loop assumes; None: no bound."""
    pads: bool
    """Whether prompts of different lengths may share a batch of `generate`."""

    def shares_beginnings(self, positions: int) -> bool:
        """Say whether prompts of so many positions are answered by the own loop."""
        return self.own is not None and (self.window is None or positions <= self.window)

    def answer(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Generated]:
        """Answer `prompts` (token ids), in their order."""
        longest = max(map(len, prompts)) + decoding.max_new_tokens
        if self.own is not None and self.shares_beginnings(longest):
            return self.own.generate(prompts, decoding, seeds)
        plain = generate if self.pads else generate_alike
        return plain(self.model, self.vocabulary, prompts, decoding, seeds)


def choose_decoder(model: Any, vocabulary: Vocabulary) -> Decoder:
    """Return the fastest way of decoding that gives what `model.generate` gives for one prompt at a time.

    Raises:
        ModelError: When the model does not generate at all.
    """
    window = attention_window(model.config.get_text_config())
    with torch.inference_mode():
        prompts = _trial_prompts(model)
        alone = _alone(model, vocabulary, prompts)
        pads = _agrees("a padded batch", model, alone, lambda: _padded(model, vocabulary, prompts))
        own = _own_loop(model, vocabulary, prompts, alone)
    return Decoder(model, vocabulary, own, window, pads)


def attention_window(config: Any) -> int | None:
    """Return how far back the nearest-sighted layer looks, None when all look back to the beginning."""
    bounds = [getattr(config, key, None) for key in _WINDOWS]
    return min((bound for bound in bounds if isinstance(bound, int) and bound > 0), default=None)


def asks_for_more(settings: Any) -> list[str]:
    """Return the keys of a generation config that the own loop does not implement."""
    return [
        key
        for key, value in settings.to_diff_dict().items()
        if key not in _HANDLED and value not in (None, False, _NEUTRAL.get(key))
    ]


def _own_loop(
    model: Any, vocabulary: Vocabulary, prompts: list[list[int]], alone: list["_Trial"]
) -> OwnLoop | None:
    if len(devices_of(model)) > 1:
        _log.info("decoding with generate: the model is spread over several devices")
        return None
    more = asks_for_more(model.generation_config)
    kernel = getattr(model.config, "_attn_implementation", None)
    if more or kernel not in MASKED:
        _log.info("decoding with generate: %s", f"generation config asks for {more}" if more else kernel)
        return None
    own = OwnLoop(model, vocabulary)

    def along() -> list[_Trial]:
        given = [trial.tokens for trial in alone]
        found = own.logits_along(prompts, given)
        return [_Trial(tokens, logits) for tokens, logits in zip(given, found, strict=True)]

    return own if _agrees("the own loop", model, alone, along) else None


@dataclass(frozen=True, slots=True)
class _Trial:
    tokens: list[int]
    logits: torch.Tensor
    """(tokens, vocabulary)."""


def _trial_prompts(model: Any) -> list[list[int]]:
    """Return two prompts of different lengths that begin alike, of ordinary tokens."""
    rows = model.get_input_embeddings().num_embeddings
    ids = [(11 + 7 * place) % rows for place in range(12)]
    return [ids[:9], ids[:3] + ids[9:11]]


def _alone(model: Any, vocabulary: Vocabulary, prompts: list[list[int]]) -> list[_Trial]:
    try:
        return [_padded(model, vocabulary, [prompt])[0] for prompt in prompts]
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise ModelError(
            f"connector 'hf_text': the model loads but does not generate ({kind}: {error!r}); "
            "connector_kwargs.model_id must name a causal language model that transformers can run"
        ) from error


def _padded(model: Any, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]]) -> list[_Trial]:
    ids, mask = left_padded(prompts, vocabulary.pad, model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        pad_token_id=vocabulary.pad,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[:, ids.shape[1] :].tolist()
    logits = torch.stack(output.logits, dim=1)
    return [_Trial(row, steps) for row, steps in zip(tokens, logits, strict=True)]


def _agrees(what: str, model: Any, alone: list[_Trial], attempt: Callable[[], list[_Trial]]) -> bool:
    """Say whether an attempt gives the logits that each prompt gives alone, up to rounding."""
    try:
        found = attempt()
    # What a model of any origin may raise when it cannot be called so; then it is decoded another way.
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
    ) as error:
        _log.info("%s does not work with this model: %r", what, error)
        return False
    worst = max(_difference(one, other) for one, other in zip(alone, found, strict=True))
    if worst > TOLERANCE.get(model.dtype, TOLERANCE[torch.float16]):
        _log.info("%s gives other logits than one prompt alone, by %.3g standard deviations", what, worst)
        return False
    return True


def _difference(one: _Trial, other: _Trial) -> float:
    """Return the mean difference of logits in standard deviations, up to the first token that differs."""
    same = [left == right for left, right in zip(one.tokens, other.tokens, strict=True)]
    steps = [*same, False].index(False) + 1
    left, right = one.logits[:steps].float(), other.logits[:steps].float()
    # A NaN compares as large: such a model is answered one length at a time.
    ratio = float((left - right).abs().mean() / left.std().clamp_min(1e-30))
    return ratio if ratio == ratio else float("inf")  # noqa: PLR0124 -- NaN is what is looked for
