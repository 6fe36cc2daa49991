"""Chooses the fastest way of answering batches that equals the model's `generate` for single prompts.

There are four ways, the fastest first: the own loop, `generate` with padding, `generate` for prompts of one
length at a time, `generate` for one prompt at a time. Properties of the loaded model rule some out (its
cache, its attention kernel, positions that change with the length). Trials compare the others with single
prompts, with the model's own settings, up to the study's longest prompt. A way whose logits differ is used
only up to the length at which they were equal.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import Decoding, OutOfMemory
from mllm_shapx.models.decoding import OwnLoop
from mllm_shapx.models.devices import devices_of, memory_errors
from mllm_shapx.models.generation_settings import GenerationSettings, LogitsRules
from mllm_shapx.models.plain_generate import (
    Generated,
    PromptBatch,
    call_generate,
    generate,
    grouped,
    in_groups,
    left_padded,
)
from mllm_shapx.models.positions import ChangingPositions

_log = logging.getLogger(__name__)

STEPS = 3
"""Tokens generated in a trial."""
FIRST_TRIAL = 16
"""Positions of the trial after loading."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Largest mean difference of logits that counts as rounding, in standard deviations of the logits."""
RULES_TOLERANCE = 0.25
"""Largest difference between the settings' changes of a logit, in standard deviations of the logits."""
MASKED = {"sdpa", "eager"}
"""Attention kernels that accept a mask of any shape."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Config keys of the attention window, for configs without a value per layer."""
_NEEDED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
"""Arguments of `forward` that the own loop passes."""
_CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)
"""Errors of a model that does not support a call; another way is used then."""


@dataclass(slots=True)
class _Way:
    """One way of answering batches."""

    name: str
    answer: Callable[[PromptBatch], list[Generated]]
    attempt: Callable[[list["_Trial"]], list["_Trial"]] | None
    """Repeats trials in this way; None for the reference, which needs no trial."""
    limit: int | None
    """Most positions (prompt and answer) for this way; None: no known bound, 0: never."""
    proved: int = 0
    """Positions up to which trials equalled single prompts."""

    def takes(self, positions: int) -> bool:
        """Return whether this way may answer prompts of `positions` positions, answer included."""
        return self.limit is None or positions <= self.limit


class Decoder:
    """Answers batches in the fastest way that equals `generate` for each prompt alone.

    It replaces the model's generation config. `positions` is the size of the model's position table; None
    without one.

    Raises:
        ModelError: When the model cannot generate.
    """

    def __init__(self, model: Any, settings: GenerationSettings, positions: int | None = None) -> None:
        self.model = model
        """The transformers model."""
        self.settings = settings
        """The settings of its generation config."""
        self._positions = positions
        model.generation_config = settings.greedy()
        self.changing_positions = ChangingPositions(model)
        self._out_of_memory = False
        self._reached = FIRST_TRIAL if positions is None else min(FIRST_TRIAL, positions)
        with torch.inference_mode():
            first = self._trials_alone(self._reached, cached=True)
            self._ways = [self._own_way(first), *self._generate_ways()]
            self.prove(self._reached)

    @property
    def way(self) -> str:
        """Return the name of the way for the longest prompts so far."""
        return self.way_for(self._reached)

    def way_for(self, positions: int) -> str:
        """Return the name of the way for prompts of `positions` positions, answer included."""
        return self._way_for(positions).name

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on slower ways."""
        way = self._way_for(self._reached)
        if way is self._ways[2]:
            why = (
                f"its generation config sets {', '.join(self.settings.unknown or self.settings.honoured)}"
                if self.settings.depend_on_padding
                else "padding would change its answers"
            )
            return (f"only prompts of equal length share a batch of this model, because {why}",)
        if way is self._ways[3]:
            why = "sharing a batch would change its answers"
            if self._out_of_memory:
                why = "the memory does not hold a trial of longer prompts side by side"
            return (f"this model answers one prompt at a time, because {why}; expect a low speed",)
        return ()

    def shares_beginnings(self, positions: int) -> bool:
        """Return whether the own loop answers prompts of `positions` positions."""
        return self._ways[0].takes(positions)

    def answer(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Generated]:
        """Answer `prompts` (token ids), in their order.

        Raises:
            RowError: When the model's logits are not numbers.
        """
        lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
        self.prove(max(lengths))
        ways = [self._ways.index(self._way_for(length)) for length in lengths]
        batch = PromptBatch(prompts, decoding, seeds)
        return in_groups(grouped(ways), lambda places: self._ways[ways[places[0]]].answer(batch.part(places)))

    def prove(self, positions: int) -> None:
        """Run the missing trials of each way at lengths up to `positions`."""
        if all(way.proved >= positions or not way.takes(way.proved + 1) for way in self._ways[:-1]):
            return
        bound = FIRST_TRIAL
        while bound < positions:
            bound *= 2
        bound = bound if self._positions is None else min(bound, self._positions)
        self._reached = max(self._reached, bound)
        try:
            with torch.inference_mode():
                self._prove_all()
        except OutOfMemory:
            # A trial is up to twice as long as the prompts, which may still fit.
            _log.info("the memory does not hold a trial of %d positions", self._reached)
            self._out_of_memory = True
            for way in self._ways[:-1]:
                way.limit = way.proved if way.limit is None else min(way.limit, way.proved)

    def _prove_all(self) -> None:
        alone: dict[int, list[_Trial]] = {}
        for way in self._ways[:-1]:
            bound = self._reached if way.limit is None else min(self._reached, way.limit)
            if bound > max(way.proved, STEPS):
                if bound not in alone:
                    alone[bound] = self._trials_alone(bound)
                self._prove_way(way, bound, alone[bound])

    def _way_for(self, positions: int) -> _Way:
        return next(way for way in self._ways if way.takes(positions))

    # --- the ways

    def _own_way(self, alone: list["_Trial"]) -> _Way:
        own = OwnLoop(self.model, self.settings)

        def attempt(trials: list[_Trial]) -> list[_Trial]:
            prompts = [trial.prompt for trial in trials]
            logits = own.logits_along(prompts, [trial.tokens for trial in trials])
            return [
                _Trial(trial.prompt, trial.tokens, each, self._ruled(trial.prompt, trial.tokens, each))
                for trial, each in zip(trials, logits, strict=True)
            ]

        reason = self._against_own_loop(alone)
        if reason is not None:
            _log.info("the own loop is not used: %s", reason)
        limit = self.changing_positions.smallest_bound(_window(self.model, alone)) if reason is None else 0
        return _Way("own loop", own.generate, attempt, limit)

    def _generate_ways(self) -> list[_Way]:
        def alike(batch: PromptBatch) -> list[Generated]:
            groups = grouped(map(len, batch.prompts))
            return in_groups(groups, lambda places: self._generate(batch.part(places)))

        def singly(batch: PromptBatch) -> list[Generated]:
            return [self._generate(batch.part([place]))[0] for place in range(len(batch.prompts))]

        padded = 0 if self.settings.depend_on_padding else self.changing_positions.smallest_bound(None)
        return [
            _Way("generate", self._generate, self._trials, padded),
            _Way("generate, equal lengths", alike, self._trials_alike, None),
            _Way("generate, one prompt at a time", singly, None, None),
        ]

    def _generate(self, batch: PromptBatch) -> list[Generated]:
        with self.changing_positions.reset():
            return generate(self.model, self.settings, batch)

    def _against_own_loop(self, alone: list["_Trial"]) -> str | None:
        """Return why the own loop cannot serve this model; None when it can."""
        if self.settings.unknown:
            return f"generation config asks for {', '.join(self.settings.unknown)}"
        kernel = getattr(self.model.config, "_attn_implementation", None)
        if kernel not in MASKED:
            return f"attention kernel {kernel!r}"
        missing = _NEEDED - inspect.signature(self.model.forward).parameters.keys()
        if missing:
            return f"forward does not take {', '.join(sorted(missing))}"
        if len(devices_of(self.model)) > 1:
            return "the model is spread over several devices"
        return _unusual_cache(alone[0].cache)

    # --- trials

    def _prove_way(self, way: _Way, bound: int, alone: list["_Trial"]) -> None:
        """Try one way with prompts of up to `bound` positions, answers included."""
        if way.attempt is None:
            return
        try:
            with memory_errors(self.model.device):
                found = way.attempt(alone)
        except _CANNOT as error:
            _log.info("%s does not work with this model: %r", way.name, error)
            way.limit = way.proved
            return
        worst = max(_difference(one, other) for one, other in zip(alone, found, strict=True))
        if worst > TOLERANCE.get(self.model.dtype, TOLERANCE[torch.float16]):
            _log.info("%s gives other logits at %d positions than one prompt alone", way.name, bound)
            way.limit = way.proved
        else:
            way.proved = bound

    def _trials_alone(self, positions: int, *, cached: bool = False) -> list["_Trial"]:
        """Return trials of single prompts of up to `positions` positions."""
        prompts = _trial_prompts(self.model, positions - STEPS)
        try:
            with memory_errors(self.model.device):
                return [self._trial([prompt], cached=cached)[0] for prompt in prompts]
        except _CANNOT as error:
            kind = getattr(self.model.config, "model_type", type(self.model).__name__)
            raise ModelError(
                f"connector 'hf_text': the model loads but does not generate ({kind}: {error!r}); "
                "connector_kwargs.model_id must name a causal language model that transformers can run"
            ) from error

    def _trials(self, trials: list["_Trial"]) -> list["_Trial"]:
        return self._trial([trial.prompt for trial in trials])

    def _trials_alike(self, trials: list["_Trial"]) -> list["_Trial"]:
        groups = grouped(len(trial.prompt) for trial in trials)
        return in_groups(groups, lambda places: self._trial([trials[each].prompt for each in places]))

    def _trial(self, prompts: list[list[int]], *, cached: bool = False) -> list["_Trial"]:
        ids, mask = left_padded(prompts, self.settings.pad, self.model.device)
        with self.changing_positions.reset():
            output = call_generate(
                self.model,
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=STEPS,
                do_sample=False,
                pad_token_id=self.settings.pad,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                logits_processor=[self._without_end],
            )
        tokens = output.sequences[:, ids.shape[1] :].tolist()
        logits, scores = torch.stack(output.logits, dim=1), torch.stack(output.scores, dim=1)
        # The cache of long prompts is large.
        cache = getattr(output, "past_key_values", None) if cached else None
        return [
            _Trial(prompts[row], tokens[row], logits[row], scores[row], cache) for row in range(len(prompts))
        ]

    def _ruled(self, prompt: list[int], tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Return `logits`, (tokens, vocabulary), after the own loop's logits rules."""
        rules = LogitsRules(self.settings, STEPS, logits.device)
        ids = torch.tensor([[*prompt, *tokens]], device=logits.device)
        changed = [
            rules(len(prompt), ids[:, : len(prompt) + step], logits[step : step + 1].float().clone())
            for step in range(len(logits))
        ]
        return self._without_end(ids, torch.cat(changed))

    def _without_end(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits processor that forbids end tokens: a trial of one token would prove little."""
        del input_ids
        ends = [each for each in self.settings.eos if each < scores.shape[-1]]
        return scores.index_fill(
            -1, torch.tensor(ends, dtype=torch.long, device=scores.device), float("-inf")
        )


@dataclass(frozen=True, slots=True)
class _Trial:
    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    """The model's own, (tokens, vocabulary)."""
    scores: torch.Tensor
    """The logits after the generation config's settings, (tokens, vocabulary)."""
    cache: Any = None


def _trial_prompts(model: Any, longest: int) -> list[list[int]]:
    """Return prompts with a common prefix, of several lengths; two have `longest` tokens."""
    rows = model.get_input_embeddings().num_embeddings
    longest = max(longest, 2)
    ids = [(11 + 7 * place) % rows for place in range(longest)]
    other = [(5 + 13 * place) % rows for place in range(longest)]
    shared = longest // 3
    middle = max(longest // 2, 2)
    return [ids, ids[:shared] + other[shared:], ids[: middle - 1] + other[:1], other[: min(2, longest)]]


def _window(model: Any, alone: list[_Trial]) -> int | None:
    """Return the smallest attention window of all layers; None when every layer reads everything."""
    layers = getattr(alone[0].cache, "layers", ())
    bounds = [getattr(layer, "sliding_window", None) for layer in layers]
    config = model.config.get_text_config()
    if getattr(config, "layer_types", None) is None:
        bounds += [getattr(config, key, None) for key in _WINDOWS]
    return min((bound for bound in bounds if isinstance(bound, int) and bound > 0), default=None)


def _unusual_cache(cache: Any) -> str | None:
    """Return what a cache holds besides keys and values of all positions or a window; None for nothing."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return f"its cache has layers of kind {', '.join(kind.__name__ for kind in kinds)}" if kinds else None


def _difference(one: _Trial, other: _Trial) -> float:
    """Return the mean difference of logits in standard deviations, up to the first token that differs.

    Infinite where the settings change the logits differently, or where logits are not numbers.
    """
    steps = min(len(one.logits), len(other.logits))
    same = [left == right for left, right in zip(one.tokens[:steps], other.tokens[:steps], strict=True)]
    steps = min([*same, False].index(False) + 1, steps)
    left, right = one.logits[:steps].float(), other.logits[:steps].float()
    scale = left.std().clamp_min(1e-30)
    ratio = float((left - right).abs().mean() / scale)
    if not _ruled_alike(one, other, steps, float(scale)) or ratio != ratio:  # noqa: PLR0124 -- NaN
        return float("inf")
    return ratio


def _ruled_alike(one: _Trial, other: _Trial, steps: int, scale: float) -> bool:
    """Return whether the settings changed the logits of both equally."""
    left, right = (trial.scores[:steps].float() - trial.logits[:steps].float() for trial in (one, other))
    if not torch.equal(left.isfinite(), right.isfinite()):
        return False
    gaps = (left - right)[left.isfinite()].abs()
    return gaps.numel() == 0 or float(gaps.max()) <= RULES_TOLERANCE * scale
