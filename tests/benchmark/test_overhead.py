"""The cost beside the model: both sides play the same game with a model that answers at once."""

import asyncio

from bench_overhead import measure_overhead


def test_both_sides_play_the_same_game() -> None:
    """Values of ours and the library's agree on a game whose answers all differ, and each side took time."""
    found = asyncio.run(measure_overhead(7))
    assert found.coalitions == 128
    assert found.largest_difference < 1e-9
    assert min(found.ours, found.ours_without_engine, found.library) > 0
