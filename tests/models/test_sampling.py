"""Sampling: transformers' own distribution, drawn with each prompt's own numbers."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as steps

from mllm_shapx.models.base import Decoding
from mllm_shapx.models.sampling import ALMOST_ONE, Sampler, draws_for

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 0.5, -1.0, 3.0, 1.5, 0.0, 2.5, -2.0]])


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7, "top_k": 4}, [steps.TemperatureLogitsWarper(0.7), steps.TopKLogitsWarper(4)]),
        ({"top_k": 5, "top_p": 0.8}, [steps.TopKLogitsWarper(5), steps.TopPLogitsWarper(0.8)]),
        ({"temperature": 2.0}, [steps.TemperatureLogitsWarper(2.0)]),
        ({"top_k": 6, "min_p": 0.2}, [steps.TopKLogitsWarper(6), steps.MinPLogitsWarper(0.2)]),
        ({"top_k": 6, "typical_p": 0.7}, [steps.TopKLogitsWarper(6), steps.TypicalLogitsWarper(0.7)]),
    ],
)
def test_tokens_come_as_often_as_transformers_warped_softmax_says(
    settings: dict[str, float], warpers: list[object]
) -> None:
    """An even grid of draws gives each token its share, and tokens warped away never."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    decoding = Decoding(max_new_tokens=1, text_temperature=settings.get("temperature", 1.0))
    drawn = Sampler.of(GenerationConfig(**settings), decoding)(LOGITS.expand(len(grid), -1), grid)
    expected = LogitsProcessorList(warpers)(torch.zeros((1, 0)), LOGITS.clone()).softmax(-1)[0]
    counts = torch.bincount(drawn, minlength=8) / len(grid)
    np.testing.assert_allclose(counts, expected, atol=2e-4)
    assert not counts[expected == 0].any()


def test_draws_hang_on_the_seed_alone_and_are_uniform() -> None:
    """A seed gives the same row whatever stands beside it; numbers fill [0, 1) evenly."""
    rows = draws_for([3, 2**63, -1], 4000, CPU)
    assert torch.equal(draws_for([-1], 4000, CPU)[0], rows[2])
    assert len(torch.unique(rows)) == 12_000
    assert 0 <= rows.min() < rows.max() < 1
    assert abs(float(rows.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("draw", [0.0, ALMOST_ONE])
def test_extreme_draws_give_a_possible_token(draw: float) -> None:
    """The first and the last number of the interval never point at a token that was warped away."""
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    decoding = Decoding(max_new_tokens=1, text_temperature=1.0)
    drawn = Sampler.of(GenerationConfig(), decoding)(logits, torch.tensor([draw], dtype=torch.float64))
    assert int(drawn[0]) in {1, 2}
