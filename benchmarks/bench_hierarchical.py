"""Compares `hierarchical` on 64 players with flat sampling explainers: coalitions for an equal error.

    python benchmarks/bench_hierarchical.py

In the game, a few words carry the answer, phrases of three or four neighbours act only together, and all
other words add a little. Its Shapley values are known in closed form. The error is the mean absolute
difference from them, over several games. A flat explainer's budget is doubled until its error is no larger.
No model is used.

If at most pairs of players act together, `mc` and `leverage` are exact at their smallest budget, and a
hierarchy saves nothing.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mllm_shap import PlayerSet, PlayerSpan
from numpy.typing import NDArray

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.explaining.games import Game
from mllm_shapx.explaining.hierarchical import HierarchicalExplainer
from mllm_shapx.explaining.settings import GameSettings
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand

PLAYERS = 64
K = 4
CARRYING = 4
"""Words that carry the answer."""
PHRASES = 6
"""Groups of neighbours that act only together."""
LARGEST = 1 << 13
"""Maximum number of coalitions in the search for an equal error."""
FLAT = ("limited_mc", "standard_mc", "limited_cc", "limited_neyman", "leverage")


class WordsGame:
    """A game of words and phrases: a value function and its exact values."""

    def __init__(self, seed: int, players: int = PLAYERS) -> None:
        draw = np.random.default_rng(seed)
        self.weights = draw.uniform(0.0, 0.002, players)
        self.weights[draw.choice(players, CARRYING, replace=False)] += draw.uniform(0.1, 0.3, CARRYING)
        starts, lengths = draw.choice(players - 4, PHRASES, replace=False), draw.integers(3, 5, PHRASES)
        self.phrases = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        self.bonus = draw.uniform(0.02, 0.1, PHRASES)

    @property
    def exact(self) -> NDArray[np.float64]:
        """Return the Shapley values: a word's own weight, and an equal share of each of its phrases."""
        values = self.weights.copy()
        for phrase, bonus in zip(self.phrases, self.bonus, strict=True):
            values[list(phrase)] += bonus / len(phrase)
        return values

    async def payoffs(self, everyone: int, coalitions: Sequence[int]) -> list[float]:
        """See `explaining.values.Value`."""
        count = max(1, everyone.bit_length())
        present = np.array(
            [[mask >> player & 1 for player in range(count)] for mask in coalitions], dtype=float
        )
        together = np.stack([present[:, list(phrase)].all(axis=1) for phrase in self.phrases], axis=1)
        return [float(value) for value in present @ self.weights + together @ self.bonus]


@dataclass(frozen=True, slots=True)
class Figure:
    """The cost and the error of one explainer."""

    name: str
    calls: float
    """Mean number of evaluated coalitions."""
    error: float
    """Mean absolute error of a player's value."""


def hierarchical(games: Sequence[WordsGame], k: int = K) -> Figure:
    """Return the figure of `hierarchical` with exact games of at most `k` players."""
    run = _run({"explainer_type": "hierarchical", "hierarchical": {"ks": [k], "shap_type": "exact"}})
    calls, errors = [], []
    for seed, game in enumerate(games):
        spans = tuple(PlayerSpan(0, place, place + 1, "w") for place in range(len(game.weights)))
        players = PlayerSet(tuple(map(str, range(len(spans)))), spans)
        assert run.hierarchical is not None  # noqa: S101 -- given by the config
        found = asyncio.run(HierarchicalExplainer(run, run.hierarchical, players, game).explain(seed))
        calls.append(len(found.masks))
        errors.append(np.abs(np.array(found.values) - game.exact).mean())
    return Figure(run.name, float(np.mean(calls)), float(np.mean(errors)))


def flat(games: Sequence[WordsGame], explainer: str, budget: int) -> Figure:
    """Return the figure of a flat explainer at a budget."""
    run = _run({"explainer_type": explainer, "num_samples": [budget]})
    calls, errors = [], []
    for seed, game in enumerate(games):
        singles = [1 << player for player in range(len(game.weights))]
        found = asyncio.run(Game(run, singles, 0, game).play(GameSettings(explainer, run.budget, seed)))
        calls.append(len(found.masks))
        errors.append(np.abs(np.array(found.values) - game.exact).mean())
    return Figure(explainer, float(np.mean(calls)), float(np.mean(errors)))


def flat_of_error(games: Sequence[WordsGame], explainer: str, error: float) -> Figure:
    """Return the figure at the smallest doubled budget with at most `error`, or at the largest one."""
    budget = 2 * PLAYERS + 2
    while (found := flat(games, explainer, budget)).error > error and budget < LARGEST:
        budget *= 2
    return found


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", type=int, default=5)
    options = parser.parse_args()
    games = [WordsGame(seed) for seed in range(options.games)]
    tree = hierarchical(games)
    print(f"{tree.name}: {tree.calls:.0f} coalitions, mean absolute error {tree.error:.5f}")
    for explainer in FLAT:
        found = flat_of_error(games, explainer, tree.error)
        reached = "" if found.error <= tree.error else " and more"
        share = f"hierarchical needs {tree.calls / found.calls:.3f} of them"
        print(f"{found.name}: {found.calls:.0f} coalitions{reached}, error {found.error:.5f}: {share}")
    return 0


def _run(variant: dict[str, object]) -> RunSpec:
    data = {"experiment_set_id": "figure", "experiments": [variant], "generation": {"text_temperature": 0}}
    return expand(ExperimentSet.model_validate(data)).runs[0]


if __name__ == "__main__":
    sys.exit(main())
