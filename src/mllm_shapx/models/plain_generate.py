"""Answers prompts with transformers' `generate`, which supports every model of transformers."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.generation_settings import GenerationSettings, sampling_settings
from mllm_shapx.models.sampling import FiniteLogits, Sampler, draws_for

IMPOSSIBLE = float("-inf")


@dataclass(frozen=True, slots=True)
class Generated:
    """The tokens of one answer, the end token included when it was generated."""

    token_ids: list[int]
    logprobs: list[float] | None
    """Natural-log probability of each token from the model's own logits; None unless requested."""


class AnswersBatch(Protocol):
    """Answers a batch of prompts (token ids) in their order, each with its own seed."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Generated]:
        """Return one answer per prompt."""


def in_groups(
    answer: AnswersBatch,
    groups: Iterable[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Generated]:
    """Answer `prompts` one group after the other; a group lists the indices of its prompts."""
    found: dict[int, Generated] = {}
    for group in groups:
        answers = answer([prompts[place] for place in group], decoding, [seeds[place] for place in group])
        found.update(zip(group, answers, strict=True))
    return [found[place] for place in range(len(prompts))]


def of_one_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of prompts grouped by length, the shortest first."""
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(place)
    return [groups[length] for length in sorted(groups)]


def generate(
    model: Any,
    settings: GenerationSettings,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Generated]:
    """Answer `prompts` (token ids), padded on the left to one length, in their order.

    Raises:
        RowError: When the model's logits are not numbers.
    """
    ids, mask = left_padded(prompts, settings.vocabulary.pad, model.device)
    finite = FiniteLogits()
    draw = [] if decoding.text_temperature == 0 else [_Draw(settings, decoding, seeds, model.device)]
    output = call_generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        pad_token_id=settings.vocabulary.pad,
        return_dict_in_generate=True,
        output_logits=decoding.logprobs,
        logits_processor=[_Watch(finite), *draw],
    )
    finite.check()
    tokens = output.sequences[:, ids.shape[1] :]
    logprobs = _logprobs(output.logits, tokens) if decoding.logprobs else None
    return collect(tokens.tolist(), logprobs, settings.vocabulary.eos)


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


class _Watch:
    """Logits processor that passes the logits to `FiniteLogits` unchanged."""

    def __init__(self, finite: FiniteLogits) -> None:
        self._finite = finite

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        self._finite.add(scores)
        return scores


class _Draw:
    """Logits processor that allows one token per prompt: the one drawn by the prompt's seed.

    `generate` draws for the whole batch from one generator, so an answer would depend on its batch. This
    processor runs after those of the generation config (penalties), as sampling does in `generate`.
    """

    def __init__(
        self, settings: GenerationSettings, decoding: Decoding, seeds: Sequence[int], device: Any
    ) -> None:
        self._sample = Sampler.of(sampling_settings(settings.config, decoding))
        self._draws = draws_for(seeds, decoding.max_new_tokens, device)
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        chosen = self._sample(scores, self._draws[:, self._step])
        self._step += 1
        return torch.full_like(scores, IMPOSSIBLE).scatter_(1, chosen[:, None], 0.0)
