"""Expected counts against what mllm_shap's own samplers draw."""

import random
from statistics import mean
from typing import Any

import pytest
from mllm_shap import CoalitionMask, PlayerSet, PluginGroup
from mllm_shap.estimation._shared import budget_fraction

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.explaining.settings import GameSettings, explain_config, resolve
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand
from mllm_shapx.planning.units import expected_answers

SAMPLING = ("limited_mc", "standard_mc", "limited_cc", "standard_cc", "limited_neyman", "standard_neyman")
FURTHER = (
    "leverage",
    "proxy",
    "kernel_banzhaf",
    "limited_mc_banzhaf",
    "standard_mc_banzhaf",
    "proxy_banzhaf",
)


def sweep(*variants: dict[str, Any]) -> tuple[RunSpec, ...]:
    data = {
        "experiment_set_id": "study",
        "experiments": list(variants),
        "generation": {"text_temperature": 0},
    }
    return expand(ExperimentSet.model_validate(data)).runs


def sampled(run: RunSpec, num_players: int, row_index: int = 0) -> list[int]:
    """Return the coalitions that the library draws for one row, as bit masks."""
    settings = GameSettings(run.explainer_type, run.budget, run.seed_for(row_index))
    config = explain_config(run, settings, num_players)
    explanation = config.explanation
    estimator = resolve(config, PluginGroup.ESTIMATORS, explanation.estimator)
    evaluations = explanation.budget.evaluations_for(num_players)
    share = budget_fraction(num_players, explanation.budget.fraction, evaluations)
    players = PlayerSet(player_ids=tuple(map(str, range(num_players))))
    masks = list(estimator.sample_masks(players, share, explanation.include_minimal_masks, settings.seed))
    if hasattr(estimator, "begin_allocation"):
        estimator.begin_allocation(masks, payoffs(masks, row_index))
        masks += list(estimator.sample_allocation_masks())
    return [sum(1 << index for index, there in enumerate(mask.present) if there) for mask in masks]


def payoffs(masks: list[CoalitionMask], seed: int) -> list[float]:
    """Return payoffs of a game with a different weight per player and some noise."""
    draw = random.Random(seed)
    weights = [draw.gauss(0, 1) for _ in masks[0].present]
    return [
        sum(weight for weight, there in zip(weights, mask.present, strict=True) if there) + draw.gauss(0, 0.3)
        for mask in masks
    ]


@pytest.mark.parametrize("explainer", SAMPLING + FURTHER)
def test_a_run_evaluates_as_many_coalitions_as_planned_each_once(explainer: str) -> None:
    variant = {
        "explainer_type": explainer,
        "num_samples": [-1, 1, 2, 3, 7, 10, 17, 30, 64, 1000],
        "fractions": [0.01, 0.1, 0.33, 0.5, 0.77, 1.0],
        "linear": [0.3, 1.0, 3.0],
    }
    for run in sweep(variant):
        for num_players in (1, 2, 3, 4, 5, 7, 9):
            masks = sampled(run, num_players)
            assert len(masks) == run.coalitions(num_players), (run.name, num_players)
            assert len(set(masks)) == len(masks)


@pytest.mark.parametrize("explainer", ["exact", "exact_banzhaf"])
def test_an_exact_run_evaluates_the_whole_table(explainer: str) -> None:
    (run,) = sweep({"explainer_type": explainer})
    for num_players in range(1, 11):
        assert sorted(sampled(run, num_players)) == list(range(run.coalitions(num_players)))


def test_leave_one_out_evaluates_each_player_away_and_the_empty_prompt_for_its_value() -> None:
    (run,) = sweep({"explainer_type": "leave_one_out"})
    assert run.name == "loo"
    for num_players in range(1, 11):
        assert len({0, *sampled(run, num_players)}) == run.coalitions(num_players)


@pytest.mark.parametrize(
    ("explainers", "tolerance"),
    [
        (("limited_mc", "standard_mc"), 0.04),
        (("limited_cc", "standard_cc"), 0.08),
        # The second phase of these follows the payoffs, which nobody knows beforehand.
        (("limited_neyman", "standard_neyman"), 0.2),
        (SAMPLING, 0.08),
        (("leverage", "proxy"), 0.04),
        # Only one seed of each budget is drawn beforehand, and nothing but chance decides here.
        (("kernel_banzhaf",), 0.1),
        (("leverage", "limited_mc", "kernel_banzhaf", "limited_mc_banzhaf"), 0.08),
    ],
)
@pytest.mark.parametrize("num_players", [4, 6, 9])
def test_the_answers_that_runs_need_together_are_expected_rightly(
    explainers: tuple[str, ...], tolerance: float, num_players: int
) -> None:
    budgets = {"num_samples": [40], "fractions": [0.1, 0.3, 0.5], "linear": [1.0]}
    runs = sweep(*({"explainer_type": explainer, **budgets} for explainer in explainers))
    unions = [
        len({mask for run in runs for mask in sampled(run, num_players, row_index)})
        for row_index in range(1, 5)
    ]
    assert expected_answers(runs, num_players) == pytest.approx(mean(unions), rel=tolerance)


@pytest.mark.parametrize("num_players", [14, 17])
def test_large_tables_are_counted_from_a_part_of_the_draws(num_players: int) -> None:
    budgets = {"num_samples": [100, 300, 1000], "linear": [5.0]}
    runs = sweep(*({"explainer_type": explainer, **budgets} for explainer in SAMPLING))
    together = len({mask for run in runs for mask in sampled(run, num_players, 1)})
    assert together < 0.95 * sum(run.coalitions(num_players) for run in runs)
    assert expected_answers(runs, num_players) == pytest.approx(together, rel=0.12)


def test_runs_on_very_many_players_share_the_certain_coalitions_alone() -> None:
    runs = sweep({"explainer_type": "limited_mc", "num_samples": [1000, 2000]})
    assert expected_answers(runs, 300) == 1000 + 2000 - (2 * 300 + 2)
