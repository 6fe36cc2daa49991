"""What values must satisfy, on random games of up to ten players.

Each game is drawn anew from a seed that the test's name shows; every property is checked for every explainer
that promises it.
"""

import asyncio
import itertools
import math
from collections.abc import Sequence

import bench_hierarchical
import numpy as np
import pytest
from explaining_kit import runs_of
from mllm_shap import PlayerSet, PlayerSpan
from numpy.typing import NDArray

from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.explaining.games import Game
from mllm_shapx.explaining.hierarchical import HierarchicalExplainer
from mllm_shapx.explaining.settings import GameSettings
from mllm_shapx.planning.runs import Budget

Array = NDArray[np.float64]
SEEDS = range(12)
SAMPLING = [name for name, facts in EXPLAINERS.items() if facts.takes_budget]
(RUN,) = runs_of({"explainer_type": "exact"})


class Table:
    """A game whose value of each coalition stands in a table; counts what is asked."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.players = int(math.log2(len(values)))

    async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
        """See `explaining.values.Value`."""
        assert everyone == len(self.values) - 1
        return [float(self.values[mask]) for mask in coalitions]


def played(game: Array, explainer: str = "exact", budget: Budget | None = None, seed: int = 0) -> Array:
    table = Table(game)
    singles = [1 << player for player in range(table.players)]
    settings = GameSettings(explainer, budget or Budget("all"), seed)
    return np.array(asyncio.run(Game(RUN, singles, 0, table).play(settings)).values)


def random_game(seed: int) -> Array:
    """Return a random game of 1 to 10 players with a value of nobody that is not 0."""
    draw = np.random.default_rng(seed)
    players = 1 + seed % 10
    scale = 10.0 ** draw.integers(-2, 3)
    return np.asarray(draw.normal(0.3, 1.0, 1 << players) * scale)


def brute_force(game: Array, estimand: str = "shapley") -> Array:
    """Return the values from their definition: mean marginal over all orders, or over all coalitions."""
    players = int(math.log2(len(game)))
    values = np.zeros(players)
    if estimand == "banzhaf":
        for player in range(players):
            without = [mask for mask in range(len(game)) if not mask >> player & 1]
            values[player] = np.mean([game[mask | 1 << player] - game[mask] for mask in without])
        return values
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        mask = 0
        for player in order:
            values[player] += game[mask | 1 << player] - game[mask]
            mask |= 1 << player
    return np.asarray(values / len(orders))


def close(found: Array, wanted: Array, game: Array) -> bool:
    return bool(np.abs(found - wanted).max() <= 1e-9 * max(1.0, float(np.abs(game).max())))


@pytest.mark.parametrize("seed", SEEDS)
def test_values_share_out_what_everybody_adds(seed: int) -> None:
    game = random_game(seed)
    assert played(game).sum() == pytest.approx(game[-1] - game[0], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("explainer", ["exact", "exact_banzhaf"])
@pytest.mark.parametrize("seed", SEEDS)
def test_players_that_can_be_exchanged_have_equal_values(seed: int, explainer: str) -> None:
    game = random_game(seed + 1 if seed % 10 == 0 else seed)
    first, second = 0, int(math.log2(len(game))) - 1

    def exchanged(mask: int) -> int:
        bits = mask >> first & 1, mask >> second & 1
        rest = mask & ~(1 << first | 1 << second)
        return rest | bits[1] << first | bits[0] << second

    alike = (game + game[[exchanged(mask) for mask in range(len(game))]]) / 2
    values = played(alike, explainer)
    assert values[first] == pytest.approx(values[second], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("explainer", ["exact", "exact_banzhaf", "loo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_player_without_influence_has_the_value_0(seed: int, explainer: str) -> None:
    game = random_game(seed)
    player = seed % int(math.log2(len(game)))
    without = game[[mask & ~(1 << player) for mask in range(len(game))]]
    assert played(without, explainer)[player] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("explainer", ["exact", "exact_banzhaf", "loo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_values_of_a_mixture_are_the_mixture_of_values(seed: int, explainer: str) -> None:
    one, other = random_game(seed), random_game(seed + 10)
    mixed = played(2.5 * one - 0.75 * other, explainer)
    assert close(mixed, 2.5 * played(one, explainer) - 0.75 * played(other, explainer), np.r_[one, other])


@pytest.mark.parametrize("estimand", ["shapley", "banzhaf"])
@pytest.mark.parametrize("players", range(1, 8))
def test_exact_values_are_those_of_the_definition(players: int, estimand: str) -> None:
    game = np.random.default_rng(players).normal(size=1 << players)
    explainer = "exact" if estimand == "shapley" else "exact_banzhaf"
    assert close(played(game, explainer), brute_force(game, estimand), game)


@pytest.mark.parametrize("explainer", SAMPLING)
@pytest.mark.parametrize("players", [1, 2, 3, 6, 9])
def test_with_every_coalition_a_sampling_explainer_is_exact(explainer: str, players: int) -> None:
    game = np.random.default_rng(players).normal(size=1 << players)
    exact = "exact_banzhaf" if EXPLAINERS[explainer].estimand == "banzhaf" else "exact"
    found = played(game, explainer, Budget("fraction", 1.0), seed=3)
    assert found == pytest.approx(played(game, exact), abs=1e-9)


def smooth_game(seed: int) -> Array:
    """Return a game of nine players with weights and interactions of two and three, as answers have them."""
    draw = np.random.default_rng(seed)
    masks = np.arange(1 << 9)
    game = np.zeros(len(masks))
    for size, scale in ((1, 1.0), (2, 0.3), (3, 0.3)):
        for group in itertools.combinations(range(9), size):
            inside = sum(1 << player for player in group)
            game += scale * draw.normal() * ((masks & inside) == inside)
    return game


@pytest.mark.parametrize("explainer", SAMPLING)
def test_a_larger_budget_brings_a_sampling_explainer_closer(explainer: str) -> None:
    exact = "exact_banzhaf" if EXPLAINERS[explainer].estimand == "banzhaf" else "exact"

    def error(budget: int) -> float:
        errors = []
        for seed in range(6):
            game = smooth_game(seed)
            found = played(game, explainer, Budget("num_samples", budget), seed)
            errors.append(np.sqrt(np.mean((found - played(game, exact)) ** 2)))
        return float(np.mean(errors))

    least, more, most = error(-1), error(160), error(400)
    assert most < 0.75 * least
    assert most < more < 1.1 * least


def tree(game: "Table | bench_hierarchical.WordsGame", players: int, k: int, inner: str = "exact") -> Array:
    block = {"ks": [k], "shap_type": inner, "use_importance_sampling": False}
    if inner != "exact":
        block["shap_num_samples"] = [40]
    (run,) = runs_of({"explainer_type": "hierarchical", "hierarchical": block})
    assert run.hierarchical is not None
    spans = tuple(PlayerSpan(0, place, place + 1, "w") for place in range(players))
    row = PlayerSet(tuple(map(str, range(players))), spans)
    return np.array(asyncio.run(HierarchicalExplainer(run, run.hierarchical, row, game).explain(5)).values)


@pytest.mark.parametrize(
    "inner", ["exact", "limited_mc", "standard_cc", "limited_neyman", "leverage", "proxy"]
)
def test_a_hierarchy_in_which_all_players_fit_is_the_flat_explainer(inner: str) -> None:
    game = np.random.default_rng(4).normal(size=1 << 7)
    budget = Budget("all") if inner == "exact" else Budget("num_samples", 40)
    assert list(tree(Table(game), 7, 7, inner)) == list(played(game, inner, budget, seed=5))


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("players", [9, 16])
def test_a_hierarchy_of_small_games_is_exact_where_players_add_up(players: int, k: int) -> None:
    weights = np.random.default_rng(players).normal(size=players)

    class Sum(Table):
        async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
            assert everyone == (1 << players) - 1
            rows = np.array([[mask >> player & 1 for player in range(players)] for mask in coalitions])
            return [float(value) for value in 0.5 + rows @ weights]

    assert tree(Sum(np.zeros(2)), players, k) == pytest.approx(weights, abs=1e-9)


def test_on_64_players_a_hierarchy_needs_less_than_a_tenth_of_the_calls_of_equal_error() -> None:
    """`benchmarks/bench_hierarchical.py` prints the figure for several explainers."""
    games = [bench_hierarchical.WordsGame(0)]
    found = bench_hierarchical.hierarchical(games)
    assert found.calls < 400
    for explainer in ("limited_mc", "limited_cc"):
        flat = bench_hierarchical.flat(games, explainer, int(10 * found.calls))
        assert flat.error > found.error, "ten times the calls, and still farther from the exact values"
