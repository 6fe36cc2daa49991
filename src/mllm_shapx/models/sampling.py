"""Draws the next token of each prompt from the prompt's own random numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mllm_shapx.errors import RowError
from mllm_shapx.models.base import Decoding

ALMOST_ONE = 1.0 - 2.0**-40
"""Largest draw, so that rounding never gives an index after the last token."""


class FiniteLogits:
    """Checks that all logits of a batch are finite, once at its end: no step waits for the device.

    It is a logits processor of `generate` that changes nothing.
    """

    def __init__(self) -> None:
        self._finite: torch.Tensor | None = None

    def __call__(self, input_ids: object, logits: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the logits of one step, (prompts, vocabulary). One NaN makes the largest logit NaN."""
        finite = logits.amax(dim=-1).isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        return logits

    def check(self) -> None:
        """Raise `RowError` when a largest logit was not a number."""
        if self._finite is not None and not bool(self._finite):
            raise not_finite()


def not_finite() -> RowError:
    """Return the error of a prompt whose logits are not numbers."""
    return RowError(
        "non_finite_logits",
        "the model's logits are not finite numbers, so that its answer would mean nothing: float16 overflows "
        "on many models that were trained in bfloat16, and damaged weights may hold NaN; try bfloat16 or "
        "float32 (connector_kwargs.dtype)",
    )


def draws_for(seeds: Sequence[int], steps: int, device: Any) -> torch.Tensor:
    """Return uniform draws in [0, 1), shaped (prompts, steps).

    Row i depends on `seeds[i]` alone (Philox, counter-based), not on the other rows of the batch.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed & (2**64 - 1))).random(steps) for seed in seeds]
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    return torch.tensor(np.stack(rows), dtype=dtype, device=device).clamp_(max=ALMOST_ONE)


def pick(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return one token per row by inverting the cumulative distribution of softmax(scores) at `draws`.

    `scores` are warped logits, shaped (prompts, vocabulary); `draws` has one number in [0, 1) per prompt.
    """
    mass = scores.to(draws.dtype).softmax(dim=-1).cumsum(dim=-1)
    targets = (draws * mass[:, -1])[:, None]
    return torch.searchsorted(mass, targets, right=True)[:, 0].clamp_(max=scores.shape[-1] - 1)


Step = Callable[[Any, torch.Tensor], torch.Tensor]
"""A logits processor of transformers: (token ids, unused here; scores) -> scores."""


class Sampler:
    """Draws tokens with a temperature, a top-k and further steps.

    With `Sampler.of` the steps and their order are those of transformers' `generate` with `do_sample=True`.
    Steps after top-k see only the k likeliest tokens, not the whole vocabulary.

    Args:
        temperature: Above 0.
        top_k: Number of tokens that may be drawn; None or 0 for all.
        before: Steps between temperature and top-k.
        after: Steps after top-k.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        *,
        before: Sequence[Step] = (),
        after: Sequence[Step] = (),
    ) -> None:
        self._temperature = temperature
        self._top_k = top_k or 0
        self._before = before
        self._after = after

    @classmethod
    def of(cls, config: Any, decoding: Decoding) -> "Sampler":
        """Return the sampler of text with a generation config of transformers.

        Without a top-k in either, transformers' default of 50 applies, as in `generate`.
        """
        from transformers.generation import logits_process as steps

        top_k = config.top_k if decoding.text_top_k is None else decoding.text_top_k
        return cls(
            decoding.text_temperature,
            50 if top_k is None else top_k,
            before=[] if config.top_h is None else [steps.TopHLogitsWarper(config.top_h)],
            after=_after_top_k(config),
        )

    def __call__(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return one token per row from the model's logits; shapes as in `pick`."""
        scores = logits.float() / self._temperature
        for step in self._before:
            scores = step(None, scores)
        ids: torch.Tensor | None = None
        if 0 < self._top_k < scores.shape[-1]:
            # In vocabulary order, so that ties do not depend on the device's sort.
            ids = scores.topk(self._top_k, dim=-1).indices.sort(dim=-1).values
            scores = scores.gather(1, ids)
        for step in self._after:
            scores = step(None, scores)
        chosen = pick(scores, draws)
        return chosen if ids is None else ids.gather(1, chosen[:, None])[:, 0]


def _after_top_k(settings: Any) -> list[Step]:
    from transformers.generation import logits_process as steps

    found: list[Step] = []
    if settings.top_p is not None and settings.top_p < 1.0:
        found.append(steps.TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        found.append(steps.MinPLogitsWarper(settings.min_p))
    if settings.typical_p is not None and settings.typical_p < 1.0:
        found.append(steps.TypicalLogitsWarper(settings.typical_p))
    if settings.epsilon_cutoff:
        found.append(steps.EpsilonLogitsWarper(settings.epsilon_cutoff))
    if settings.eta_cutoff:
        found.append(steps.EtaLogitsWarper(settings.eta_cutoff))
    return found
