"""Batches of prompts and continuations for reading likelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_shap import ConversationSnapshot

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import Decoding, Forcing, Likelihood, Model, OutOfMemory, Prompt

SIZE = 128
"""Prompts per batch if the config has no number: several pieces of a prefix tree."""


@dataclass(frozen=True, slots=True)
class LikelihoodBatch:
    """Encoded prompts of one forcing, read together."""

    places: Sequence[int]
    """Index of each prompt in the forcing."""
    prompts: Sequence[Any]
    continuations: Sequence[Sequence[int]]
    top_k: int


def encode_batches(
    encode: Callable[[Sequence[ConversationSnapshot], Decoding], Sequence[Prompt]],
    forcing: Forcing,
    batch_key: Callable[[Any], Any],
    size: int,
) -> list[LikelihoodBatch]:
    """Encode the prompts by `encode`, sort them by `batch_key` and cut them into batches of `size`.

    Raises:
        RowError: When a prompt cannot be encoded, or leaves no room for its continuation.
    """
    longest = max(map(len, forcing.continuations))
    decoding = replace(forcing.decoding, max_new_tokens=longest)
    prompts = encode(forcing.snapshots, decoding)
    order = sorted(range(len(prompts)), key=lambda place: batch_key(prompts[place]))
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        LikelihoodBatch(
            places,
            [prompts[place] for place in places],
            [forcing.continuations[place] for place in places],
            forcing.top_k,
        )
        for places in groups
    ]


def read_batch(model: Any, batch: LikelihoodBatch, on_halving: Callable[[], None]) -> list[Likelihood]:
    """Return the likelihoods of a batch; a batch that does not fit in memory is read in halves.

    Raises:
        ModelError: When a single prompt does not fit, or the model reads no likelihoods.
    """
    try:
        found: list[Likelihood] = model.likelihoods(batch.prompts, batch.continuations, batch.top_k)
    except (OutOfMemory, MemoryError) as error:
        on_halving()
        if len(batch.places) == 1:
            raise _too_long(model, batch) from error
    else:
        return found
    middle = len(batch.places) // 2
    halves = (slice(None, middle), slice(middle, None))
    return [
        each
        for half in halves
        for each in read_batch(
            model,
            LikelihoodBatch(batch.places[half], batch.prompts[half], batch.continuations[half], batch.top_k),
            on_halving,
        )
    ]


def _too_long(model: Model, batch: LikelihoodBatch) -> ModelError:
    identity = model.identity
    return ModelError(
        f"model {identity.model_id!r} on {identity.device}: the memory does not hold one prompt of "
        f"{batch.prompts[0].length} positions with an answer of {len(batch.continuations[0])} tokens; use a "
        "smaller dtype (connector_kwargs.dtype), fewer workers per device, or a device with more memory"
    )
