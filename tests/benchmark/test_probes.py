"""The search for a batch size and rows in flight, with a model that answers at once."""

import asyncio

from mllm_shapx.benchmark.overhead import InstantModel, instant_game
from mllm_shapx.benchmark.probes import Prober, Recommendation


def recommend(seconds: float) -> Recommendation:
    games = [instant_game(5) for _ in range(4)]
    prober = Prober(InstantModel(), games, largest=64, say=lambda _: None)
    return asyncio.run(prober.recommend(2, seconds))


def test_with_time_it_tries_sizes_and_rows_in_flight() -> None:
    """It tries the automatic size first, others no larger than there are prompts, and 1, 2 and 4 rows."""
    found = recommend(60.0)
    assert found.probes[0].batch_size is None
    assert {probe.rows_in_flight for probe in found.probes} == {1, 2, 4}
    fixed = [probe.batch_size for probe in found.probes if probe.batch_size is not None]
    assert fixed
    assert all(8 <= size <= 64 for size in fixed)
    assert found.batch_size in {probe.engine_batch_size for probe in found.probes}
    assert found.rows_in_flight in {1, 2, 4}


def test_without_time_the_automatic_size_has_to_do() -> None:
    """On a slow model nothing new is begun once the time is over; there is a recommendation all the same."""
    found = recommend(0.0)
    assert [(probe.batch_size, probe.rows_in_flight) for probe in found.probes] == [(None, 2)]
    assert found.batch_size == found.probes[0].engine_batch_size
    assert found.rows_in_flight == 2
