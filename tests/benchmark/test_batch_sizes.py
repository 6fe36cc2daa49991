"""Trying batch sizes, with a model that answers at once."""

import asyncio

from bench_overhead import InstantModel, instant_game

from mllm_shapx.benchmark.bench import try_batch_sizes
from mllm_shapx.benchmark.ours import Explainer


def tried(coalitions: int, rows: int = 4) -> list[int]:
    async def rates() -> dict[int, float]:
        explainer = Explainer(InstantModel(), 2, batch_size=32)
        games = [instant_game(5) for _ in range(rows)]
        try:
            return await try_batch_sizes(explainer, games, coalitions, 2, say=lambda _: None)
        finally:
            await explainer.engine.aclose()

    return list(asyncio.run(rates()))


def test_with_time_it_tries_the_size_found_its_half_and_its_double() -> None:
    """The size found comes first."""
    assert tried(1000) == [32, 16, 64]


def test_no_size_is_larger_than_there_are_prompts() -> None:
    """One row of 5 words has 32 prompts."""
    assert tried(1000, rows=1) == [32, 16]


def test_without_time_for_a_batch_none_is_tried() -> None:
    """On a slow model the size found has to do."""
    assert tried(20) == []
