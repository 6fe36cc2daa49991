"""Drawing the next token of each prompt from that prompt's own random numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mllm_shapx.errors import RowError

ALMOST_ONE = 1.0 - 2.0**-40
"""Largest draw, so that rounding never points behind the last token."""


class FiniteLogits:
    """Whether all logits of a batch are numbers; asked once at its end, so that no step waits for it."""

    def __init__(self) -> None:
        self._finite: torch.Tensor | None = None

    def add(self, logits: torch.Tensor) -> None:
        """Take the logits of one step, (prompts, vocabulary). A NaN among them makes the largest one NaN."""
        finite = logits.amax(dim=-1).isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite

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

    Row i hangs on `seeds[i]` alone (Philox, counter-based), so that an answer does not change with its
    batch-mates.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed & (2**64 - 1))).random(steps) for seed in seeds]
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    return torch.tensor(np.stack(rows), dtype=dtype, device=device).clamp_(max=ALMOST_ONE)


def pick(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return one token per row by inverting the cumulative distribution of softmax(scores) at `draws`.

    Args:
        scores: Warped logits, shaped (prompts, vocabulary).
        draws: One number in [0, 1) per prompt.
    """
    mass = scores.to(draws.dtype).softmax(dim=-1).cumsum(dim=-1)
    targets = (draws * mass[:, -1])[:, None]
    return torch.searchsorted(mass, targets, right=True)[:, 0].clamp_(max=scores.shape[-1] - 1)


class Sampler:
    """Draws tokens with the temperature, top-k, top-p and what else a generation config asks for.

    The steps and their order are those of transformers' `generate` with `do_sample=True`; behind top-k they
    see the k likeliest tokens only, instead of the whole vocabulary.
    """

    def __init__(self, settings: Any) -> None:
        from transformers.generation import logits_process as steps

        self._top_k = int(settings.top_k or 0)
        self._before: list[Any] = []
        if settings.temperature not in {None, 1.0}:
            self._before.append(steps.TemperatureLogitsWarper(float(settings.temperature)))
        if getattr(settings, "top_h", None) is not None:
            self._before.append(steps.TopHLogitsWarper(settings.top_h))
        self._behind = _behind_top_k(settings)

    def __call__(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return one token per row.

        Args:
            logits: The model's, shaped (prompts, vocabulary).
            draws: One number in [0, 1) per prompt.
        """
        scores = logits.float()
        for step in self._before:
            scores = step(None, scores)
        ids: torch.Tensor | None = None
        if 0 < self._top_k < scores.shape[-1]:
            # In the order of the vocabulary, so that ties do not hang on how the device sorts.
            ids = scores.topk(self._top_k, dim=-1).indices.sort(dim=-1).values
            scores = scores.gather(1, ids)
        for step in self._behind:
            scores = step(None, scores)
        chosen = pick(scores, draws)
        return chosen if ids is None else ids.gather(1, chosen[:, None])[:, 0]


def _behind_top_k(settings: Any) -> list[Any]:
    from transformers.generation import logits_process as steps

    found: list[Any] = []
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
