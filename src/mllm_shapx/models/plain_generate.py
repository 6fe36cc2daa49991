"""Answers prompts with transformers' `generate`, which supports every model of transformers."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.generation_settings import GenerationSettings
from mllm_shapx.models.sampling import FiniteLogits, Sampler, draws_for

IMPOSSIBLE = float("-inf")


@dataclass(frozen=True, slots=True)
class Generated:
    """The tokens of one answer, the end token included when it was generated."""

    token_ids: list[int]
    logprobs: list[float] | None
    """Natural-log probability of each token from the model's own logits; None unless requested."""


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts to be answered together."""

    prompts: Sequence[Sequence[int]]
    """Token ids, none empty."""
    decoding: Decoding
    seeds: Sequence[int]
    """One per prompt: it decides the prompt's random draws."""

    def part(self, places: Iterable[int]) -> "PromptBatch":
        """Return the prompts at `places`, in that order."""
        places = list(places)
        seeds = [self.seeds[place] for place in places]
        return PromptBatch([self.prompts[place] for place in places], self.decoding, seeds)


def in_groups[T](groups: Iterable[Sequence[int]], read: Callable[[Sequence[int]], Iterable[T]]) -> list[T]:
    """Return what `read` gives for each group of indices, in the order of the indices 0, 1, ..."""
    found: dict[int, T] = {}
    for group in groups:
        found.update(zip(group, read(group), strict=True))
    return [found[place] for place in range(len(found))]


def grouped(keys: Iterable[int]) -> list[list[int]]:
    """Return the indices of equal keys together, the smallest key first."""
    groups: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return [groups[key] for key in sorted(groups)]


def generate(model: Any, settings: GenerationSettings, batch: PromptBatch) -> list[Generated]:
    """Answer prompts, padded on the left to one length, in their order.

    Raises:
        RowError: When the model's logits are not numbers.
    """
    decoding = batch.decoding
    ids, mask = left_padded(batch.prompts, settings.pad, model.device)
    finite = FiniteLogits()
    draw = [] if decoding.text_temperature == 0 else [_Draw(settings, batch, model.device)]
    output = call_generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        pad_token_id=settings.pad,
        return_dict_in_generate=True,
        output_logits=decoding.logprobs,
        logits_processor=[finite, *draw],
    )
    finite.check()
    tokens = output.sequences[:, ids.shape[1] :]
    logprobs = _logprobs(output.logits, tokens) if decoding.logprobs else None
    return collect(tokens.tolist(), logprobs, settings.eos)


def call_generate(model: Any, **arguments: Any) -> Any:
    """Return `model.generate(**arguments)`; hide its warnings about settings, which repeat per batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"transformers\.generation")
        return model.generate(**arguments)


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask), both (prompts, longest), with the padding before each prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    return ids, mask


def collect(
    tokens: list[list[int]], logprobs: list[list[float]] | None, eos: Sequence[int]
) -> list[Generated]:
    """Cut each row of generated tokens (and their log-probabilities) after its first end token."""
    found = []
    for row, ids in enumerate(tokens):
        end = next((place + 1 for place, token in enumerate(ids) if token in eos), len(ids))
        found.append(Generated(ids[:end], None if logprobs is None else logprobs[row][:end]))
    return found


def _logprobs(logits: Sequence[torch.Tensor], tokens: torch.Tensor) -> list[list[float]]:
    columns = [token_logprobs(step, tokens[:, index]) for index, step in enumerate(logits)]
    rows: list[list[float]] = torch.stack(columns, dim=1).tolist()
    return rows


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits) at `tokens`: (prompts, vocabulary), (prompts,) -> (prompts,) in float32."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None].to(logits.device))[:, 0]


class _Draw:
    """Logits processor that allows one token per prompt: the one drawn by the prompt's seed.

    `generate` draws for the whole batch from one generator, so an answer would depend on its batch. This
    processor runs after those of the generation config (penalties), as sampling does in `generate`.
    """

    def __init__(self, settings: GenerationSettings, batch: PromptBatch, device: Any) -> None:
        self._sample = Sampler.of(settings.config, batch.decoding)
        self._draws = draws_for(batch.seeds, batch.decoding.max_new_tokens, device)
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        chosen = self._sample(scores, self._draws[:, self._step])
        self._step += 1
        return torch.full_like(scores, IMPOSSIBLE).scatter_(1, chosen[:, None], 0.0)
