"""The search for a batch size and rows in flight, with a model that answers at once."""

import asyncio

from bench_overhead import InstantModel, instant_game

from mllm_shapx.benchmark.probes import Prober, Recommendation


def recommend(seconds: float, rows: int = 4) -> Recommendation:
    games = [instant_game(5) for _ in range(rows)]
    prober = Prober(InstantModel(), games, largest=64, say=lambda _: None)
    return asyncio.run(prober.recommend(32, 2, seconds))


def test_with_time_it_tries_sizes_and_rows_in_flight() -> None:
    """It tries the size found first, others no larger than there are prompts, and 1, 2 and 4 rows."""
    found = recommend(60.0)
    assert found.probes[0].batch_size == 32
    assert {probe.rows_in_flight for probe in found.probes} == {1, 2, 4}
    sizes = {probe.batch_size for probe in found.probes}
    assert len(sizes) > 1
    assert all(8 <= size <= 64 for size in sizes)
    assert found.batch_size in sizes
    assert found.rows_in_flight in {1, 2, 4}


def test_without_time_the_size_found_has_to_do() -> None:
    """On a slow model nothing new is begun once the time is over; there is a recommendation all the same."""
    found = recommend(0.0)
    assert [(probe.batch_size, probe.rows_in_flight) for probe in found.probes] == [(32, 2)]
    assert (found.batch_size, found.rows_in_flight) == (32, 2)


def test_one_row_says_nothing_of_rows_in_flight() -> None:
    """Where there is one row to try on, only batch sizes are tried."""
    found = recommend(60.0, rows=1)
    assert {probe.rows_in_flight for probe in found.probes} == {2}
    assert found.rows_in_flight == 2
