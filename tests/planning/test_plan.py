"""The plan's figures, as data and as a table."""

import json
from typing import Any

import pytest

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.planning.hopeless import hopeless_runs
from mllm_shapx.planning.plan import Plan, make_plan
from mllm_shapx.planning.players import PlayerCounts, PlayerRule
from mllm_shapx.planning.sweep import expand

EXACT = {"explainer_type": "exact"}
ROWS = {4: 3, 9: 5, 2: 5}
HIERARCHICAL = {"explainer_type": "hierarchical", "hierarchical": {"ks": 3, "shap_type": "exact"}}


def planned(*variants: dict[str, Any], players: dict[int, int] | None = ROWS, **blocks: Any) -> Plan:
    blocks = {"generation": {"text_temperature": 0}, **blocks}
    data = {"experiment_set_id": "study", "experiments": list(variants), **blocks}
    runs = expand(ExperimentSet.model_validate(data)).runs
    return make_plan("study", runs, tuple(ROWS) if players is None else tuple(players), players)


def test_beside_an_exact_run_the_others_cost_no_model_call() -> None:
    data = planned({"num_samples": [10]}, EXACT, {"explainer_type": "cc", "fractions": [0.5]}).to_json()
    calls = {run["name"]: (run["coalitions"], run["model_calls"]) for run in data["runs"]}
    assert calls == {
        "limited_mc_ns10": (8 + 10 + 10, 0),
        "exact": (8 + 32 + 32, 72),
        "limited_cc_frac0_5": (8 + 16 + 16, 0),
    }
    totals = data["totals"]
    assert (totals["runs"], totals["rows"], totals["samples"]) == (3, 3, 9)
    assert (totals["model_calls_without_sharing"], totals["model_calls"]) == (140, 72)
    assert totals["sharing_factor"] == pytest.approx(140 / 72)
    assert totals["model_calls_are_an_estimate"] is False


def test_runs_that_share_no_answers_cost_what_they_evaluate_and_the_plan_says_why() -> None:
    plan = planned(EXACT, {"num_samples": [10]}, generation={"text_temperature": 0.7})
    assert plan.totals()["model_calls"] == plan.totals()["coalitions"] == 72 + 28
    assert "text_temperature 0.7" in plan.notes[0]


def test_sampling_runs_alone_are_an_estimate_between_the_largest_and_the_sum() -> None:
    plan = planned({"num_samples": [14, 18]}, {"explainer_type": "standard_cc", "num_samples": [16]})
    totals = plan.totals()
    assert 8 + 18 + 18 <= totals["model_calls"] < totals["coalitions"]
    assert totals["model_calls_are_an_estimate"] is True
    assert "about" in plan.to_text()


def test_faithfulness_curves_cost_at_most_what_the_plan_counts() -> None:
    """On 6 players: 5 inner points of 2 + 3 orders each, where so many coalitions of a size exist."""
    variant, curves = {"num_samples": [14]}, {"steps": 10, "random": 3}
    plan = planned(variant, players={4: 6}, faithfulness=curves)
    assert plan.totals()["coalitions"] == plan.totals()["model_calls"] == 14 + 5 * 5
    assert plan.totals()["model_calls_are_an_estimate"] is True
    assert any("faithfulness" in note for note in plan.notes)
    beside = planned(variant, EXACT, players={4: 6}, faithfulness=curves).totals()
    assert (beside["coalitions"], beside["model_calls"]) == (14 + 25 + 64, 64)
    assert beside["model_calls_are_an_estimate"] is False
    two = planned({"num_samples": [14, 18]}, players={4: 12}, faithfulness=curves).totals()
    assert 18 + 9 * 5 <= two["model_calls"] <= 14 + 18 + 2 * 9 * 5


def test_a_variant_has_its_own_curves_or_none() -> None:
    variants = [
        {"num_samples": 9},
        {"num_samples": 8, "faithfulness": {"steps": 3}},
        {**EXACT, "faithfulness": None},
    ]
    data = {"experiment_set_id": "study", "faithfulness": {"random": 2}, "experiments": variants}
    runs = expand(ExperimentSet.model_validate(data)).runs
    steps = [None if run.faithfulness is None else run.faithfulness.model_dump() for run in runs]
    assert steps == [{"steps": 10, "random": 2}, {"steps": 3, "random": 5}, None]
    again = {"experiment_set_id": "study", "experiments": [run.variant for run in runs]}
    assert [run.result_settings for run in expand(ExperimentSet.model_validate(again)).runs] == [
        run.result_settings for run in runs
    ]


def test_the_resolved_budget_stands_beside_each_run() -> None:
    variants = ({"num_samples": [-1], "fractions": [0.5], "linear": [3.0]}, EXACT, HIERARCHICAL)
    runs = planned(*variants).to_json()["runs"]
    assert [run["budget"] for run in runs] == [
        {"kind": "num_samples", "value": -1},
        {"kind": "fraction", "value": 0.5},
        {"kind": "linear", "value": 3.0},
        {"kind": "all", "value": None},
        {"kind": "all", "value": None},
    ]
    assert [(run["num_samples"], run["fraction"], run["linear"]) for run in runs[:3]] == [
        (-1, None, None),
        (None, 0.5, None),
        (None, None, 3.0),
    ]
    assert runs[4]["hierarchical"]["k"] == 3
    assert runs[4]["hierarchical"]["inner_budget"] == {"kind": "all", "value": None}


def test_rows_with_too_many_players_are_named_and_not_counted() -> None:
    plan = planned(EXACT, {"num_samples": [50]}, players={0: 4, 1: 25, 2: 5_000})
    runs = {run["name"]: run for run in plan.to_json()["runs"]}
    assert (runs["exact"]["refused_samples"], runs["exact"]["coalitions"]) == (2, 16)
    assert runs["limited_mc_ns50"]["refused_samples"] == 0
    assert any(note.startswith("exact: 2 row(s)") for note in plan.notes)
    json.dumps(plan.to_json())
    assert "16" in plan.to_text()


def test_the_table_shows_how_many_rows_will_fail_and_the_bound_on_the_players() -> None:
    plan = planned(EXACT, {"num_samples": [50]}, players={0: 4, 1: 25})
    heads, exact, sampling, every = plan.to_text().splitlines()[2:6]
    assert "will fail" in heads
    assert exact.split() == ["exact", "exact", "all", "2", "1", "16", "16"]
    assert sampling.split()[3:5] == ["2", "0"]
    assert every.split() == ["all", "4", "1", "82", "66"]
    note, _ = plan.notes
    assert note.startswith("exact: 1 row(s) of 2 have more than 24 players and will fail")
    assert "selection.max_prompt_tokens to 24 or less" in note
    assert "will fail" not in planned(EXACT).to_text()


@pytest.mark.parametrize(
    ("variant", "most"),
    [
        (EXACT, 24),
        ({"fractions": [0.5]}, 25),
        ({"fractions": [0.01]}, 30),
        ({"explainer_type": "hierarchical", "hierarchical": {"ks": 30, "shap_type": "exact"}}, 24),
    ],
)
def test_the_bound_is_the_largest_number_of_players_that_can_be_explained(
    variant: dict[str, Any], most: int
) -> None:
    (run,) = expand(
        ExperimentSet.model_validate({"experiment_set_id": "study", "experiments": [variant]})
    ).runs
    (found,) = hopeless_runs([run], (0, 1, 2), {0: 40, 1: most, 2: most + 1})
    assert (found.rows, found.rows_in_all, found.most_players) == (2, 3, most)


def test_a_variant_s_own_token_filter_counts_its_own_players() -> None:
    players = PlayerCounts({0: 2}, {PlayerRule("none"): {0: 4}})
    every_word = {**EXACT, "name": "words", "shap_override": {"token_filter": "none"}}
    data = planned(EXACT, every_word, players=players).to_json()
    assert [run["coalitions"] for run in data["runs"]] == [4, 16]
    assert data["totals"]["model_calls"] == 20, "other players share no answers"


def test_without_the_dataset_runs_are_listed_and_figures_are_unknown() -> None:
    runs = expand(ExperimentSet.model_validate({"experiment_set_id": "study", "experiments": [EXACT]})).runs
    plan = make_plan("study", runs, None, None)
    data = plan.to_json()
    assert data["rows"] is None
    assert data["runs"][0]["name"] == "exact"
    assert data["runs"][0]["coalitions"] is None
    assert data["totals"]["model_calls"] is None
    assert "rows not looked at" in plan.to_text()


def test_spoken_rows_are_counted_but_not_their_players() -> None:
    plan = planned(EXACT, players=None)
    assert plan.totals()["samples"] == 3
    assert plan.totals()["coalitions"] is None
    assert plan.to_json()["rows"][0] == {"row_index": 4, "num_players": None}
    assert "3 row(s), players known once" in plan.to_text()


def test_the_table_has_a_line_per_run_and_aligned_columns() -> None:
    lines = (
        planned(EXACT, {"num_samples": [1000], "name": "many"}, players={0: 12, 1: 13}).to_text().splitlines()
    )
    assert lines[0] == "study: 2 run(s), 2 row(s) of 12 to 13 players (median 12.5)"
    table = lines[2:6]
    assert [line.split()[0] for line in table] == ["run", "exact", "many_limited_mc_ns1000", "all"]
    assert len({len(line) for line in table}) == 1
    assert table[3].split() == ["all", "4", "14,288", "12,288"]


@pytest.mark.parametrize(
    ("num_players", "k", "coalitions"),
    [
        (3, 3, 8),
        # Two groups of 3: the top game, then two games of which the top game has two coalitions.
        (6, 3, 4 + 6 + 6),
        (5, 3, 4 + 6 + 2),
        # Groups of 4, then of 2, then single players.
        (8, 2, 4 + 2 * 2 + 4 * 2),
        (0, 3, 1),
        (1, 3, 2),
    ],
)
def test_a_full_hierarchy_is_counted_game_by_game(num_players: int, k: int, coalitions: int) -> None:
    variant = {"explainer_type": "hierarchical", "hierarchical": {"ks": k, "shap_type": "exact"}}
    (run,) = expand(
        ExperimentSet.model_validate({"experiment_set_id": "study", "experiments": [variant]})
    ).runs
    assert run.coalitions(num_players) == coalitions
    assert not run.is_hopeless(10_000)


def test_a_budget_outside_its_bounds_is_said_with_the_rows() -> None:
    variants = (
        {"num_samples": [-1, 3, 14, 40]},
        {"explainer_type": "leverage", "num_samples": [-1, 11], "linear": [1.0]},
        {"explainer_type": "standard_mc", "fractions": [0.01]},
        {"explainer_type": "loo"},
    )
    plan = planned(*variants)
    bounds = {run["name"]: run["budget_bounds"] for run in plan.to_json()["runs"]}
    # Two rows of 5 players and one of 3: floors 7 and 5, or 12 and 8; ceilings 32 and 8.
    assert bounds == {
        "limited_mc_ns-1": {"floor": "n + 2", "ceiling": "2^n", "rows_raised": 0, "rows_cut": 0},
        "limited_mc_ns3": {"floor": "n + 2", "ceiling": "2^n", "rows_raised": 3, "rows_cut": 0},
        "limited_mc_ns14": {"floor": "n + 2", "ceiling": "2^n", "rows_raised": 0, "rows_cut": 1},
        "limited_mc_ns40": {"floor": "n + 2", "ceiling": "2^n", "rows_raised": 0, "rows_cut": 3},
        "leverage_ns-1": {"floor": "2n + 2", "ceiling": "2^n", "rows_raised": 0, "rows_cut": 0},
        "leverage_ns11": {"floor": "2n + 2", "ceiling": "2^n", "rows_raised": 2, "rows_cut": 1},
        "leverage_lin1_0": {"floor": "2n + 2", "ceiling": "2^n", "rows_raised": 0, "rows_cut": 1},
        "standard_mc_frac0_01": {"floor": "2", "ceiling": "2^n", "rows_raised": 3, "rows_cut": 0},
        "loo": {"floor": "n + 2", "ceiling": "2^n", "rows_raised": 0, "rows_cut": 0},
    }
    text = plan.to_text()
    assert (
        "floor of n + 2 coalitions for n players, which are evaluated instead: limited_mc_ns3 (3 row(s))"
        in text
    )
    assert "above the 2^n coalitions that there are: limited_mc_ns14 (1 row(s))" in text


def test_where_players_are_not_known_the_bounds_are_said_alone() -> None:
    tree = {"explainer_type": "hierarchical", "hierarchical": {"ks": 6, "shap_num_samples": 3}}
    first, second = planned({"num_samples": [3]}, tree, players=None).to_json()["runs"]
    assert first["budget_bounds"] == {
        "floor": "n + 2", "ceiling": "2^n", "rows_raised": None, "rows_cut": None
    }  # fmt: skip
    assert second["budget_bounds"]["lower_floor"] == "n + 2"
    assert "hier_limited_mc_k6_imp0_1_ns3 (games of limited_mc)" in planned(tree).to_text()
