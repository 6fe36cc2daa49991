"""The sweep: names, budgets and overrides of runs."""

from typing import Any

import pytest

from mllm_shapx.config.models import EmbeddingConfig, ExperimentSet
from mllm_shapx.errors import ConfigError
from mllm_shapx.planning.runs import Budget, RunSpec
from mllm_shapx.planning.sweep import expand


def experiment_set(*variants: dict[str, Any], **blocks: Any) -> ExperimentSet:
    return ExperimentSet.model_validate(
        {"experiment_set_id": "study", "experiments": list(variants), **blocks}
    )


def runs(*variants: dict[str, Any], **blocks: Any) -> dict[str, RunSpec]:
    return {run.name: run for run in expand(experiment_set(*variants, **blocks)).runs}


def hierarchical(name: str | None = None, **block: Any) -> dict[str, Any]:
    return {"explainer_type": "hierarchical", "name": name, "hierarchical": block}


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ({"explainer_type": "exact"}, ["exact"]),
        ({"explainer_type": "exact", "name": "truth"}, ["truth"]),
        ({"num_samples": [50, -1]}, ["limited_mc_ns50", "limited_mc_ns-1"]),
        ({"explainer_type": "mc", "fractions": [0.1, 1]}, ["limited_mc_frac0_1", "limited_mc_frac1_0"]),
        (
            {"explainer_type": "standard_cc", "name": "a.b", "linear": [3, 0.25], "num_samples": 8},
            ["a.b_standard_cc_ns8", "a.b_standard_cc_lin3_0", "a.b_standard_cc_lin0_25"],
        ),
        ({"explainer_type": "neyman", "name": "n", "fractions": 0.5}, ["n_limited_neyman_frac0_5"]),
        (hierarchical(), ["hier_limited_mc_k10_imp0_1"]),
        (hierarchical(shap_type="exact", ks=[3, 4]), ["hier_exact_k3_imp0_1", "hier_exact_k4_imp0_1"]),
        (
            hierarchical("h", ks=5, shap_type="cc", importance_min_fractions=[0, 0.25], shap_num_samples=[9]),
            ["h_hier_cc_k5_imp0_0_ns9", "h_hier_cc_k5_imp0_25_ns9"],
        ),
        (
            hierarchical(
                shap_type="standard_mc",
                first_layer_type="CC",
                shap_fractions=[0.5],
                first_layer_num_samples=[20],
                ks=[2],
            ),
            ["hier_standard_mc_k2_imp0_1_flCC_frac0_5_flns20"],
        ),
        (
            hierarchical(
                shap_num_samples=[8], shap_fractions=[0.5], first_layer_num_samples=9, first_layer_fractions=1
            ),
            ["hier_limited_mc_k10_imp0_1_ns8_frac0_5_flns9_flfrac1_0"],
        ),
        (hierarchical(shap_type="neyman"), ["hier_neyman_k10_imp0_1"]),
        (hierarchical(shap_type="Neyman", ks=3), ["hier_neyman_k3_imp0_1"]),
        (hierarchical(shap_type="limited_neyman"), ["hier_limited_neyman_k10_imp0_1"]),
        (hierarchical(shap_type="complementary"), ["hier_complementary_k10_imp0_1"]),
        (hierarchical(shap_type="PRECISE", ks=2), ["hier_precise_k2_imp0_1"]),
        (
            hierarchical(shap_type="exact", ks=2, shap_num_samples=[10, 20]),
            ["hier_exact_k2_imp0_1_ns10", "hier_exact_k2_imp0_1_ns20"],
        ),
        (
            hierarchical("p", shap_type="exact", ks=2, shap_fraction=0.25, first_layer_type="Exact"),
            ["p_hier_exact_k2_imp0_1_flExact_frac0_25"],
        ),
        (
            hierarchical(
                shap_type="mc", first_layer_type="exact", first_layer_num_samples=5, first_layer_fraction=0.5
            ),
            ["hier_mc_k10_imp0_1_flexact_flns5_flfrac0_5"],
        ),
        (
            {"num_samples": [50], "fractions": [0.5], "seeds": [0, 7]},
            [
                "limited_mc_ns50_seed0",
                "limited_mc_ns50_seed7",
                "limited_mc_frac0_5_seed0",
                "limited_mc_frac0_5_seed7",
            ],
        ),
        ({"num_samples": 50, "shap_override": {"seed": 3}}, ["limited_mc_ns50_seed3"]),
        ({"explainer_type": "exact", "name": "truth", "seeds": 1}, ["truth_seed1"]),
        (
            {**hierarchical(shap_type="mc", shap_num_samples=6), "seeds": [2]},
            ["hier_mc_k10_imp0_1_ns6_seed2"],
        ),
    ],
)
def test_runs_are_named_as_the_formats_say(variant: Any, names: Any) -> None:
    assert list(runs(variant)) == names


def test_a_hierarchical_grid_is_the_product_of_its_axes() -> None:
    grid = runs(
        hierarchical(
            ks=[2, 3],
            importance_min_fractions=[0.1, 0.2],
            shap_num_samples=[4, 5],
            first_layer_fractions=[0.5, 1],
        )
    )
    assert len(grid) == 16
    assert all(run.hierarchical is not None for run in grid.values())


def test_a_budget_that_an_exact_game_does_not_read_makes_a_run_of_its_own() -> None:
    grid = runs(hierarchical(shap_type="exact", ks=2, shap_num_samples=[10, 20]))
    assert len(grid) == 2
    assert {run.hierarchical and run.hierarchical.inner_budget for run in grid.values()} == {Budget("all")}


def test_a_name_as_written_stands_for_the_same_explainer() -> None:
    (run,) = runs(hierarchical(shap_type="Neyman", shap_num_samples=9)).values()
    assert run.hierarchical is not None
    assert (run.hierarchical.inner_type, run.hierarchical.first_layer_type) == ("limited_neyman",) * 2


def test_seeds_draw_other_coalitions_and_stand_in_the_settings_only_when_they_are_set() -> None:
    (plain,) = runs({"num_samples": 9}).values()
    zero, one = runs({"num_samples": 9, "seeds": [0, 1]}).values()
    (override,) = runs({"num_samples": 9, "shap_override": {"seed": 1}}).values()
    assert len({run.seed_for(4) for run in (plain, zero, one)}) == 3
    assert "seed" not in plain.result_settings
    assert (zero.result_settings["seed"], one.result_settings["seed"]) == (0, 1)
    assert (override.name, override.result_settings) == (one.name, one.result_settings)


def test_every_run_is_one_entry_of_a_config_again() -> None:
    """The words of `spec.json` give the same run: name, budgets and settings."""
    written: list[dict[str, Any]] = [
        {"explainer_type": "exact", "name": "truth"},
        {"num_samples": [5, -1], "fractions": [0.25], "linear": [3], "seeds": [0, 4]},
        {"explainer_type": "neyman", "fractions": [0.5], "name": "n", "shap_override": {"seed": 2}},
        hierarchical(
            "h",
            ks=[2, 3],
            shap_type="cc",
            shap_fractions=[0.5, 0.25],
            first_layer_type="MC",
            first_layer_num_samples=[7],
            use_importance_sampling=False,
            importance_min_fractions=[0, 0.2],
        ),
        hierarchical(shap_type="exact", shap_num_samples=[4]),
    ]
    made = runs(*written)
    assert len(made) == 1 + 8 + 1 + 8 + 1
    for name, run in made.items():
        (again,) = runs(dict(run.variant)).values()
        assert (again.name, again.result_settings) == (name, run.result_settings)


def test_budgets_are_resolved_as_written() -> None:
    made = runs({"explainer_type": "exact"}, {"num_samples": [-1], "fractions": [0.5], "linear": [3.0]})
    assert [run.budget for run in made.values()] == [
        Budget("all"),
        Budget("num_samples", -1),
        Budget("fraction", 0.5),
        Budget("linear", 3.0),
    ]


@pytest.mark.parametrize(
    ("block", "inner", "first_layer"),
    [
        ({"shap_type": "exact"}, Budget("all"), Budget("all")),
        ({"shap_type": "mc"}, Budget("num_samples", -1), Budget("num_samples", -1)),
        ({"shap_type": "mc", "shap_fractions": 0.5}, Budget("fraction", 0.5), Budget("fraction", 0.5)),
        ({"shap_num_samples": 9, "first_layer_type": "exact"}, Budget("num_samples", 9), Budget("all")),
        ({"shap_type": "exact", "first_layer_type": "cc"}, Budget("all"), Budget("num_samples", -1)),
        (
            {"shap_num_samples": 9, "first_layer_fractions": 0.5},
            Budget("num_samples", 9),
            Budget("fraction", 0.5),
        ),
        ({"shap_num_samples": 9, "shap_fractions": 0.5}, Budget("num_samples", 9), Budget("num_samples", 9)),
    ],
)
def test_a_hierarchical_budget_that_is_not_given_follows_the_documented_rule(
    block: Any, inner: Any, first_layer: Any
) -> None:
    (run,) = runs(hierarchical(**block)).values()
    assert run.hierarchical is not None
    assert (run.hierarchical.inner_budget, run.hierarchical.first_layer_budget) == (inner, first_layer)


def test_a_run_that_occurs_twice_with_the_same_settings_is_run_once_with_a_warning() -> None:
    sweep = expand(experiment_set({"num_samples": [5, 5]}, {"explainer_type": "mc", "num_samples": [5]}))
    assert [run.name for run in sweep.runs] == ["limited_mc_ns5"]
    assert len(sweep.warnings) == 2
    assert "experiments[1]" in sweep.warnings[1]
    assert "experiments[0]" in sweep.warnings[1]


def test_one_name_with_two_settings_is_refused_naming_both_variants_and_what_differs() -> None:
    changed = {"explainer_type": "exact", "shap_override": {"normalizer": "IdentityNormalizer"}}
    with pytest.raises(ConfigError) as caught:
        expand(experiment_set({"explainer_type": "exact"}, changed))
    (problem,) = caught.value.problems
    assert problem.path == "experiments[1]"
    for words in ('"exact"', "experiments[0]", "shap.normalizer", "IdentityNormalizer"):
        assert words in problem.message


def test_a_run_is_not_named_like_the_folder_of_the_store() -> None:
    with pytest.raises(ConfigError, match=r"experiments\[0\]\.name"):
        expand(experiment_set({"explainer_type": "exact", "name": "generations"}))


def test_a_variant_s_overrides_change_only_what_they_name() -> None:
    blocks = {
        "shap": {"similarity": "CosineSimilarity", "reducer": "MaxReducer"},
        "generation": {"max_new_tokens": 8, "text_top_k": 5},
        "embedding": {"model_id": "a/b", "max_length": 9},
    }
    plain, changed = runs(
        {"explainer_type": "exact"},
        {
            "explainer_type": "exact",
            "name": "changed",
            "shap_override": {"reducer": "SumReducer", "mode": None},
            "generation_override": {"text_top_k": None, "max_new_tokens": None},
            "embedding_override": {"model_id": "c/d"},
        },
        **blocks,
    ).values()
    assert (plain.shap.reducer, changed.shap.reducer) == ("MaxReducer", "SumReducer")
    assert changed.shap.similarity == "CosineSimilarity"
    assert (changed.generation.text_top_k, changed.generation.max_new_tokens) == (None, 8)
    assert plain.embedding == EmbeddingConfig(model_id="a/b", max_length=9)
    assert changed.embedding == EmbeddingConfig(model_id="c/d", max_length=9)


def test_runs_that_compare_words_know_of_no_encoder() -> None:
    (run,) = runs({"explainer_type": "exact"}, embedding={"model_id": "a/b"}).values()
    assert run.embedding is None


def test_the_default_model_is_pinned() -> None:
    (run,) = runs({"explainer_type": "exact"}, connector="hf_text").values()
    assert (run.model_id, run.model_revision) == (
        "microsoft/phi-2",
        "ef382358ec9e382308935a992d908de099b64c23",
    )


def test_a_variant_without_what_its_explainer_needs_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a budget"):
        expand(experiment_set({"explainer_type": "limited_mc"}))
    with pytest.raises(ConfigError, match="needs a hierarchical block"):
        expand(experiment_set({"explainer_type": "hierarchical"}))
