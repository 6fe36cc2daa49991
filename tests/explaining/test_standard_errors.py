"""How far a value may be off: its standard error against the exact value, on random games."""

import asyncio

import check_coverage
import numpy as np
import pytest
from check_coverage import SAMPLING, coverage, exact_values, play, smooth
from explaining_kit import WORDS, explain, row_of, runs_of

from mllm_shapx.explaining.standard_errors import standard_errors
from mllm_shapx.planning.runs import Budget


@pytest.mark.parametrize("explainer", SAMPLING)
def test_the_exact_value_lies_within_two_standard_errors_as_often_as_it_should(explainer: str) -> None:
    """`scripts/check_coverage.py` prints the table of 1,000 trials."""
    found = coverage(explainer, "smooth", players=7, budget=72, trials=60)
    assert found.known == 1.0
    assert 0.9 <= found.within <= 0.99
    assert 0.85 < found.ratio < 1.25


@pytest.mark.parametrize("explainer", SAMPLING)
@pytest.mark.parametrize("players", [1, 2, 3, 6])
def test_where_every_coalition_is_evaluated_nothing_is_uncertain(explainer: str, players: int) -> None:
    game = smooth(players, np.random.default_rng(players))
    found = play(game, explainer, Budget("fraction", 1.0), 3)
    assert found.standard_errors == pytest.approx([0.0] * players, abs=1e-9)
    assert found.values == pytest.approx(exact_values(game, explainer), abs=1e-9)


@pytest.mark.parametrize("explainer", SAMPLING)
def test_standard_errors_have_the_units_of_the_game(explainer: str) -> None:
    game = smooth(7, np.random.default_rng(1))
    one = play(game, explainer, Budget("num_samples", 72), 5).standard_errors
    same = play(1000.0 + 10.0 * game, explainer, Budget("num_samples", 72), 5).standard_errors
    assert one is not None
    assert same == pytest.approx([10.0 * error for error in one], rel=1e-6)


def test_a_known_variance_of_a_mean() -> None:
    """With n = 4 the inner coalitions have two players; three of the six are drawn."""
    present = [[bool(mask >> player & 1) for player in range(4)] for mask in range(16)]
    drawn = [row for row in present if sum(row) != 2] + [
        [True, True, False, False],
        [True, False, True, False],
        [False, True, True, False],
    ]
    payoffs = [0.0] * 10 + [1.0, 3.0, 5.0]
    found = standard_errors("limited_mc", drawn, payoffs)
    assert found is not None
    # Player 0 with another one: 1 and 3 of three coalitions, variance 2; without: one draw (5) of three,
    # which takes the variance of all draws of its size, 4. Each stratum has the weight 1 / 4.
    assert found[0] == pytest.approx(np.sqrt((2.0 / 2 * (1 - 2 / 3) + 4.0 * (1 - 1 / 3)) / 16))


def test_a_player_with_an_empty_stratum_has_no_standard_error() -> None:
    game = smooth(9, np.random.default_rng(0))
    least = play(game, "limited_cc", Budget("num_samples", -1), 0).standard_errors
    assert least is not None
    assert np.isnan(least).all()


@pytest.mark.parametrize("explainer", ["exact", "exact_banzhaf", "loo", "proxy", "proxy_banzhaf"])
def test_explainers_without_draws_or_a_known_variance_have_none(explainer: str) -> None:
    game = smooth(5, np.random.default_rng(0))
    budget = Budget("num_samples", 14) if explainer.startswith("proxy") else Budget("all")
    assert play(game, explainer, budget, 0).standard_errors is None


def test_a_sample_says_how_sure_it_is_and_what_the_values_lack() -> None:
    row = row_of(" ".join(WORDS[:7]))
    exact, sampled, banzhaf, tree = (
        explain(row, run)
        for run in runs_of(
            {"explainer_type": "exact"},
            {"num_samples": 60},
            {"explainer_type": "mc_banzhaf", "num_samples": 60},
            {"explainer_type": "hierarchical", "hierarchical": {"ks": [3]}},
        )
    )
    assert exact.to_json()["standard_errors"] is tree.to_json()["standard_errors"] is None
    for sample in (sampled, banzhaf):
        data = sample.to_json()
        assert len(data["standard_errors"]) == data["num_players"] == 7
        assert all(error > 0 for error in data["standard_errors"])
        lacking = sum(data["raw_values"]) - (data["grand_value"] - data["base_value"])
        assert data["efficiency_residual"] == pytest.approx(lacking)
    assert sampled.raw_values is not None
    assert exact.raw_values is not None
    assert sampled.standard_errors is not None
    off = [
        abs(one - true) > 3 * error
        for one, true, error in zip(
            sampled.raw_values, exact.raw_values, sampled.standard_errors, strict=True
        )
    ]
    assert not any(off)


def test_a_value_that_is_no_number_makes_nothing_certain() -> None:
    table = check_coverage.Table(np.full(1 << 4, np.nan))
    payoffs = asyncio.run(table.payoffs(15, range(16)))
    present = [[bool(mask >> player & 1) for player in range(4)] for mask in range(16)]
    found = standard_errors("leverage", present, payoffs)
    assert found is not None
    assert np.isnan(found).all()
