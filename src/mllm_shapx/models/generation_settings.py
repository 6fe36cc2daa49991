"""Reads a model's own generation config and decides how each setting is handled.

transformers' generation settings fall into four groups: settings without effect here, settings that the
study's `generation` block replaces, settings that are applied, and settings that cannot be applied. A
replaced setting gives a note; a setting that cannot be applied raises `ModelError`.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_shapx.errors import ModelError

GENERATION_FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
"""Settings that shape the distribution of sampled tokens; `sampling.Sampler` implements them."""
_WITHOUT_EFFECT = frozenset(
    {
        *_SAMPLING,
        # The study's `generation` block decides these.
        *("max_length", "max_new_tokens", "do_sample"),
        # Does not change the order of tokens.
        "renormalize_logits",
        # For beam search and assisted decoding only.
        *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "low_memory"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "is_assistant"),
        *("max_matching_ngram_size", "speculation_type"),
        # For encoders only.
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        # Change the speed, not the tokens.
        *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("prefill_chunk_size", "continuous_batching_config"),
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
        *("output_hidden_states", "transformers_version", "_from_model_config"),
    }
)
_HONOURED = frozenset(
    {
        *("sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length"),
        *("min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty"),
    }
)
"""Settings that change an answer's logits depending on its tokens (see `LogitsRules`)."""
_REPLACED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "answers are decoded greedily or sampled, never by beam search"),
    "max_time": (None, "an answer must not depend on how fast the machine is"),
    "cache_implementation": (None, "the plain cache gives the model's own answers"),
    "remove_invalid_values": (None, "logits that are not numbers are an error of the row"),
}
"""Setting -> (replacement, reason)."""
_IMPOSSIBLE = {
    "stop_strings": "stop strings",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "use_mtp": "assisted decoding",
    "num_return_sequences": "several answers to one prompt",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "token_healing": "token healing",
    "custom_generate": "a decoding method of its own",
}
"""Setting -> its meaning in words."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "cache_implementation": ("dynamic", "hybrid"),
}
"""Setting -> values without effect, besides null and false."""


@dataclass(frozen=True)
class GenerationSettings:
    """A model's generation config, sorted by how each setting is handled."""

    config: Any
    """The generation config to use: the model's own without replaced settings."""
    eos: tuple[int, ...]
    """The tokens of which the first ends an answer; empty when only the length does."""
    pad: int
    """The token that pads prompts."""
    honoured: dict[str, Any] = field(default_factory=dict)
    """Settings that are applied as `generate` applies them."""
    replaced: dict[str, Any] = field(default_factory=dict)
    """Settings that are not applied, with their values in the model's config."""
    unknown: tuple[str, ...] = ()
    """Settings that only `generate` can apply, for prompts of one length at a time."""
    notes: tuple[str, ...] = ()

    def greedy(self) -> Any:
        """Return the generation config for token choice outside `generate`.

        It lacks `max_length` and the sampling settings: `generate` would only warn about them.
        """
        config = copy.deepcopy(self.config)
        config.max_length = None
        config.do_sample = False
        for key in _SAMPLING:
            setattr(config, key, None)
        return config

    @property
    def depend_on_padding(self) -> bool:
        """Whether `generate` would read the padding of a batch as part of the prompt."""
        return bool(self.honoured or self.unknown)

    def record(self) -> dict[str, Any]:
        """Return the settings for `spec.json`, as JSON data."""
        return {
            "eos_token_id": list(self.eos),
            **{key: _plain(value) for key, value in self.honoured.items()},
            **{key: _plain(getattr(self.config, key, None)) for key in self.unknown},
            "not_applied": {key: _plain(value) for key, value in self.replaced.items()},
        }


def read_settings(model: Any, tokenizer: Any) -> GenerationSettings:
    """Return the settings of the generation config of `model`.

    Raises:
        ModelError: When a setting cannot be applied; the message names each one.
    """
    asked = _asked(model.generation_config)
    refuse_impossible(asked)
    config = copy.deepcopy(model.generation_config)
    replaced = {key: asked[key] for key in _REPLACED if key in asked}
    for key in replaced:
        setattr(config, key, _REPLACED[key][0])
    known = _WITHOUT_EFFECT | _HONOURED | _REPLACED.keys() | _IMPOSSIBLE.keys()
    notes = [
        f"the model's generation config sets {key} = {value!r}, which is not applied: {_REPLACED[key][1]}"
        for key, value in replaced.items()
    ]
    eos = _as_ids(config.eos_token_id)
    if not eos and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
        config.eos_token_id = tokenizer.eos_token_id
        notes.append(
            "the model's generation config names no eos_token_id; answers end with the tokenizer's "
            f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})"
        )
    return GenerationSettings(
        config=config,
        eos=eos,
        pad=_padding(model, tokenizer, eos),
        honoured={key: asked[key] for key in sorted(_HONOURED & asked.keys())},
        replaced=replaced,
        unknown=tuple(sorted(key for key in asked.keys() - known if _is_read(model, key))),
        notes=tuple(notes),
    )


def check_generation_file(file: Path) -> None:
    """Refuse a generation_config.json with settings that cannot be applied.

    A missing file, or one without a JSON object, passes here: loading reports it. Imports no torch.

    Raises:
        ModelError: See `refuse_impossible`.
    """
    try:
        asked = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(asked, dict):
        refuse_impossible(asked)


def refuse_impossible(asked: dict[str, Any]) -> None:
    """Refuse a generation config (JSON data) with settings that cannot be applied.

    Raises:
        ModelError: Names each setting and its meaning.
    """
    found = [
        f"{key} = {asked[key]!r} ({what})"
        for key, what in _IMPOSSIBLE.items()
        if key in asked and not is_neutral(key, asked[key])
    ]
    if found:
        raise ModelError(
            f"the model's generation_config.json sets {', '.join(found)}, which cannot be applied to batches "
            "of coalitions; copy the model's directory, remove the setting from its generation_config.json, "
            "and name the copy as connector_kwargs.model_id"
        )


def is_neutral(key: str, value: Any) -> bool:
    """Return whether a setting with this value has no effect."""
    return value is None or value is False or value in _NEUTRAL.get(key, ()) or value in ([], {})


class LogitsRules:
    """Applies the honoured settings of a generation config to an answer's tokens and logits.

    They are logits processors of `generate`. They read all tokens so far and count them, so padding would
    count as tokens. Therefore each call takes prompts of one length, without padding.
    """

    def __init__(self, settings: GenerationSettings, max_new_tokens: int, device: Any) -> None:
        self._config = settings.config
        self._eos = list(settings.eos)
        self._max_new_tokens = max_new_tokens
        self._device = device
        self._by_length: dict[int, list[Any]] = {}

    def __call__(self, prompt_length: int, ids: Any, logits: Any) -> Any:
        """Return the logits, (answers, vocabulary), after `ids`, (answers, tokens so far)."""
        if prompt_length not in self._by_length:
            self._by_length[prompt_length] = self._processors(prompt_length)
        for processor in self._by_length[prompt_length]:
            logits = processor(ids, logits)
        return logits

    def _processors(self, prompt_length: int) -> list[Any]:
        """Return the processors in the order in which `generate` applies them."""
        return [*self._about_words(), *self._about_length(prompt_length)]

    def _about_words(self) -> Iterator[Any]:
        from transformers.generation import logits_process as steps

        config, eos = self._config, self._eos
        if config.sequence_bias is not None:
            yield steps.SequenceBiasLogitsProcessor(sequence_bias=config.sequence_bias)
        if config.repetition_penalty not in {None, 1.0}:
            yield steps.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
        if config.no_repeat_ngram_size:
            yield steps.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        if config.bad_words_ids is not None:
            yield steps.NoBadWordsLogitsProcessor(config.bad_words_ids, eos or None)

    def _about_length(self, prompt: int) -> Iterator[Any]:
        from transformers.generation import logits_process as steps

        config, eos, device = self._config, self._eos, self._device
        if config.min_length and eos:
            yield steps.MinLengthLogitsProcessor(config.min_length, eos, device=device)
        if config.min_new_tokens and eos:
            yield steps.MinNewTokensLengthLogitsProcessor(prompt, config.min_new_tokens, eos, device=device)
        if config.forced_bos_token_id is not None:
            yield steps.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id)
        if config.forced_eos_token_id is not None:
            longest = prompt + self._max_new_tokens
            yield steps.ForcedEOSTokenLogitsProcessor(longest, config.forced_eos_token_id, device=device)
        if config.exponential_decay_length_penalty is not None:
            penalty = config.exponential_decay_length_penalty
            yield steps.ExponentialDecayLengthPenalty(penalty, eos, prompt)
        if config.suppress_tokens is not None:
            yield steps.SuppressTokensLogitsProcessor(config.suppress_tokens, device=device)
        if config.begin_suppress_tokens is not None:
            begin = prompt + int(prompt == 1 and config.forced_bos_token_id is not None)
            yield steps.SuppressTokensAtBeginLogitsProcessor(
                config.begin_suppress_tokens, begin, device=device
            )


def _asked(config: Any) -> dict[str, Any]:
    """Return the settings of a generation config that have an effect."""
    found: dict[str, Any] = config.to_dict()
    return {key: value for key, value in found.items() if not is_neutral(key, value)}


def _is_read(model: Any, key: str) -> bool:
    """Return whether `generate` may read a setting; transformers' own ignores unknown settings."""
    from transformers import GenerationConfig

    return hasattr(GenerationConfig(), key) or not type(model).__module__.startswith("transformers.")


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(dict.fromkeys([value] if isinstance(value, int) else value))


def _padding(model: Any, tokenizer: Any, eos: Sequence[int]) -> int:
    """Return a padding token that the model has; some tokenizers' padding tokens are not in the model."""
    rows = model.get_input_embeddings().num_embeddings
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *eos)
    return next((each for each in candidates if each is not None and 0 <= each < rows), 0)


def _plain(value: Any) -> Any:
    """Return a setting as JSON data."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
