"""How rows become rounds, and rounds become rates."""

from dataclasses import replace

import pytest
from bench_overhead import instant_game

from mllm_shapx.benchmark.contest import Tally, cut_into_rounds
from mllm_shapx.benchmark.subject import RowRun
from mllm_shapx.config.variants import Variant


@pytest.mark.parametrize(("rows", "in_flight", "sizes"), [
    (1, 2, [1]), (3, 2, [3]), (4, 2, [2, 2]), (10, 2, [2] * 5), (13, 1, [3, 2, 3, 2, 3]), (3, 1, [1, 1, 1]),
])  # fmt: skip
def test_rounds_are_even_and_fill_the_rows_in_flight(rows: int, in_flight: int, sizes: list[int]) -> None:
    """At most five rounds of neighbours, each with at least the rows in flight where there are so many."""
    games = [instant_game(players) for players in range(1, rows + 1)]
    rounds = cut_into_rounds(games, in_flight)
    assert sorted(map(len, rounds)) == sorted(sizes)
    assert [game for played in rounds for game in played] == games


def test_a_median_ignores_one_disturbed_round() -> None:
    """One round ten times as slow changes the total but not the median."""
    tally = Tally()
    for seconds in (1.0, 10.0, 1.0):
        tally.add(100, seconds)
    assert tally.median_rate == 100
    assert tally.total == (300, 12.0)
    assert Tally().median_rate is None


@pytest.mark.parametrize(("players", "most", "type_", "coalitions"), [
    (4, 16, "exact", 16), (4, 100, "exact", 16), (6, 20, "limited_mc", 20), (30, 64, "limited_mc", 64),
])  # fmt: skip
def test_games_are_cut_to_the_time_at_hand(players: int, most: int, type_: str, coalitions: int) -> None:
    """A game stays exact where all its coalitions fit, and is sampled otherwise."""
    game = instant_game(players).limited_to(most)
    assert game.run.explainer_type == type_
    assert game.coalitions == coalitions


def test_what_a_variant_measures_or_stops_at_is_no_part_of_the_game() -> None:
    """The number of coalitions is known beforehand, and interactions need all of them."""
    game = instant_game(9)
    variant = Variant.model_validate(
        {"stop_when": {"standard_error": 1.0}, "faithfulness": {}, "interactions": {}}
    )
    measured = {key: getattr(variant, key) for key in ("stop_when", "faithfulness", "interactions")}
    asked = RowRun(game.row, replace(game.run, **measured), 9)
    for cut in (asked.limited_to(1 << 9), asked.limited_to(30), asked.smallest()):
        assert [getattr(cut.run, key) for key in measured] == [None, None, None]
    assert asked.limited_to(30).coalitions == 30
