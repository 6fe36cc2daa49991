"""Answering a batch with transformers' own `generate`: right for every model that transformers knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.sampling import Sampler, draws_for

IMPOSSIBLE = float("-inf")


@dataclass(frozen=True, slots=True)
class Generated:
    """The tokens of one answer, the end token included when it was generated."""

    token_ids: list[int]
    logprobs: list[float] | None
    """Natural-log probability of each token from the model's own logits; None when not asked for."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that end and pad an answer."""

    eos: int | None
    pad: int


def sampling_settings(model: Any, decoding: Decoding) -> Any:
    """Return the model's generation config with `decoding`'s temperature and top-k.

    Where neither names a top-k, transformers' default of 50 holds, as in `generate`.
    """
    import copy

    settings = copy.deepcopy(model.generation_config)
    settings.temperature = decoding.text_temperature
    if decoding.text_top_k is not None:
        settings.top_k = decoding.text_top_k
    elif settings.top_k is None:
        settings.top_k = 50
    return settings


def generate_alike(
    model: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Generated]:
    """Answer as `generate` does, prompts of one length at a time: for models that padding confuses."""
    found: dict[int, Generated] = {}
    for length in {len(prompt) for prompt in prompts}:
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        alike = [prompts[place] for place in places]
        answers = generate(model, vocabulary, alike, decoding, [seeds[place] for place in places])
        found.update(zip(places, answers, strict=True))
    return [found[place] for place in range(len(prompts))]


def generate(
    model: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Generated]:
    """Answer `prompts` (token ids), padded on the left to one rectangle, in their order."""
    ids, mask = left_padded(prompts, vocabulary.pad, model.device)
    chooser = [] if decoding.text_temperature == 0 else [_Draw(model, decoding, seeds)]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        pad_token_id=vocabulary.pad,
        eos_token_id=vocabulary.eos,
        return_dict_in_generate=True,
        output_logits=decoding.logprobs,
        logits_processor=chooser,
    )
    tokens = output.sequences[:, ids.shape[1] :]
    logprobs = _logprobs(output.logits, tokens) if decoding.logprobs else None
    return collect(tokens.tolist(), logprobs, vocabulary.eos)


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask), both (prompts, longest), with the padding before each prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    return ids, mask


def collect(tokens: list[list[int]], logprobs: list[list[float]] | None, eos: int | None) -> list[Generated]:
    """Cut each row of generated tokens (and their log-probabilities) behind its first end token."""
    found = []
    for row, ids in enumerate(tokens):
        end = ids.index(eos) + 1 if eos is not None and eos in ids else len(ids)
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
    """Logits processor that leaves one token possible per prompt: the one that the prompt's seed draws.

    `generate` itself draws for the whole batch from one generator, which would make an answer hang on its
    batch-mates. It runs behind the processors of the generation config (penalties), as sampling does there.
    """

    def __init__(self, model: Any, decoding: Decoding, seeds: Sequence[int]) -> None:
        self._sample = Sampler(sampling_settings(model, decoding))
        self._draws = draws_for(seeds, decoding.max_new_tokens, model.device)
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        chosen = self._sample(scores, self._draws[:, self._step])
        self._step += 1
        return torch.full_like(scores, IMPOSSIBLE).scatter_(1, chosen[:, None], 0.0)
