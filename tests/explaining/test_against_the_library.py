"""Our values are mllm_shap's: the same row, settings and seed give what `ExplainRunner` gives."""

import asyncio
from typing import Any

import numpy as np
import pytest
from explaining_kit import WORDS, Generator, RuleBackend, explain, row_of, runs_of
from mllm_shap import ExplainRunner

from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config

EXPERIMENTS: list[dict[str, Any]] = [
    {"explainer_type": "exact"},
    {"explainer_type": "limited_mc", "fractions": [0.4]},
    {"explainer_type": "standard_mc", "num_samples": [20]},
    {"explainer_type": "limited_cc", "num_samples": [-1]},
    {"explainer_type": "standard_cc", "linear": [1.0]},
    {"explainer_type": "limited_neyman", "fractions": [0.6]},
    {"explainer_type": "standard_neyman", "linear": [2.0]},
    {"explainer_type": "leverage", "linear": [1.0]},
    {"explainer_type": "proxy", "num_samples": [24]},
    {"explainer_type": "loo"},
    {"explainer_type": "kernel_banzhaf", "fractions": [0.5]},
    {"explainer_type": "exact_banzhaf"},
    {"explainer_type": "limited_mc_banzhaf", "num_samples": [-1]},
    {"explainer_type": "standard_mc_banzhaf", "linear": [1.0]},
    {"explainer_type": "proxy_banzhaf", "num_samples": [-1]},
]


@pytest.mark.parametrize("normalizer", ["AbsSumNormalizer", "IdentityNormalizer", "MinMaxNormalizer"])
@pytest.mark.parametrize("players", [1, 2, 3, 6, 8])
def test_every_explainer_gives_the_librarys_values(players: int, normalizer: str) -> None:
    row = row_of(" ".join(WORDS[:players]), row_index=players)
    for run in runs_of(*EXPERIMENTS, shap={"normalizer": normalizer}):
        config = explain_config(
            run, GameSettings(run.explainer_type, run.budget, run.seed_for(players)), players
        )
        snapshot = open_row(row, run).snapshot
        theirs = asyncio.run(ExplainRunner(config, backend=RuleBackend()).explain(snapshot)).result
        ours = explain(row, run)
        assert ours.player_values() == pytest.approx(list(theirs.values), abs=1e-12), run.name
        assert ours.base_value == pytest.approx(theirs.base_value, abs=1e-12)
        assert ours.grand_value == pytest.approx(theirs.grand_value, abs=1e-12)


def test_the_coalitions_evaluated_are_those_of_the_plan() -> None:
    row = row_of(" ".join(WORDS[:7]))
    for run in runs_of(*EXPERIMENTS):
        generator = Generator()
        sample = explain(row, run, generator=generator)
        assert sample.n_calls == sample.model_calls == len(generator.asked) == run.coalitions(7), run.name


def test_exact_values_satisfy_efficiency() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    sample = explain(row_of(" ".join(WORDS[:6])), run)
    assert sample.imbalance < 1e-12
    assert np.isclose(sample.values_sum, sample.grand_value - sample.base_value)
