"""Work units: what is left to do, in which order, and what it is expected to cost."""

import random
import time
from typing import Any

import pytest

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand
from mllm_shapx.planning.units import NOMINAL_PLAYERS, expected_answers, explaining_order, plan_units

GREEDY = {"generation": {"text_temperature": 0}}


def sweep(*variants: dict[str, Any], **blocks: Any) -> tuple[RunSpec, ...]:
    data = {"experiment_set_id": "study", "experiments": list(variants), **GREEDY, **blocks}
    return expand(ExperimentSet.model_validate(data)).runs


GRID = sweep(
    {"num_samples": [5, 20]}, {"explainer_type": "exact"}, {"explainer_type": "cc", "fractions": [0.5]}
)


def test_a_unit_carries_all_runs_of_a_key_exact_first_then_by_falling_coalitions() -> None:
    (unit,) = plan_units(GRID, [7], {7: 6}, {})
    assert unit.run_names == ("exact", "limited_cc_frac0_5", "limited_mc_ns20", "limited_mc_ns5")
    assert (unit.row_index, unit.position, unit.cost) == (7, 0, 64.0)
    assert unit.unit_id == f"00007-{GRID[0].generation_key}"


def test_units_come_longest_expected_first_and_in_selection_order_where_equal() -> None:
    units = plan_units(GRID, [4, 9, 2, 3], {4: 3, 9: 8, 2: 5, 3: 5}, {})
    assert [(unit.row_index, unit.position) for unit in units] == [(9, 1), (2, 2), (3, 3), (4, 0)]


def test_what_is_done_is_left_out_and_a_unit_without_its_exact_run_costs_less() -> None:
    done = {
        "exact": {1, 2},
        "limited_mc_ns5": [1],
        "limited_mc_ns20": [1],
        "limited_cc_frac0_5": (1,),
        "gone": {2},
    }
    (unit,) = plan_units(GRID, [1, 2], {1: 6, 2: 6}, done)
    assert (unit.row_index, unit.run_names[0]) == (2, "limited_cc_frac0_5")
    assert 32 < unit.cost < 64


def test_runs_that_share_no_answers_are_units_of_their_own() -> None:
    runs = sweep(
        {"explainer_type": "exact"},
        {"explainer_type": "exact", "name": "longer", "generation_override": {"max_new_tokens": 64}},
        {"explainer_type": "exact", "name": "scored", "shap_override": {"similarity": "CosineSimilarity"}},
    )
    units = plan_units(runs, [0], {0: 4}, {})
    assert sorted(unit.run_names for unit in units) == [("exact", "scored"), ("longer",)]
    sampled = sweep({"num_samples": [5, 6]}, generation={"text_temperature": 1.0})
    assert len(plan_units(sampled, [0], {0: 4}, {})) == 2


def test_the_order_does_not_hang_on_the_order_in_which_done_rows_are_given() -> None:
    rows = list(range(50))
    players = {row: 3 + row % 5 for row in rows}
    shuffled = random.Random(3).sample(rows, 20)
    assert plan_units(GRID, rows, players, {"exact": shuffled}) == plan_units(
        GRID, rows, players, {"exact": sorted(shuffled)}
    )


def test_rows_of_unknown_players_keep_selection_order() -> None:
    units = plan_units(GRID, [5, 3, 8], None, {})
    assert [unit.row_index for unit in units] == [5, 3, 8]
    assert {unit.cost for unit in units} == {float(1 << NOMINAL_PLAYERS)}


def test_a_hundred_thousand_rows_are_planned_in_seconds() -> None:
    rows = list(range(100_000))
    start = time.perf_counter()
    units = plan_units(GRID, rows, {row: row % 12 for row in rows}, {"exact": rows[::2]})
    assert len(units) == 100_000
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("num_players", [0, 1, 2, 3, 62, 63, 500, 5_000])
def test_any_number_of_players_has_an_expected_cost(num_players: int) -> None:
    runs = sweep({"num_samples": [5, -1]}, {"explainer_type": "neyman", "linear": [3.0], "num_samples": 40})
    alone = [run.coalitions(num_players) for run in runs]
    expected = expected_answers(runs, num_players)
    assert max(alone) <= expected <= sum(alone) if num_players else expected == 1
    assert expected_answers(GRID, num_players) >= expected_answers(GRID[:2], num_players)


def test_one_run_alone_needs_exactly_its_coalitions() -> None:
    for run in GRID:
        assert expected_answers([run], 7) == run.coalitions(7)


def test_explaining_order_keeps_the_sweep_s_order_between_equals() -> None:
    runs = sweep({"num_samples": [9, 8]}, {"explainer_type": "standard_mc", "num_samples": [9]})
    names = [run.name for run in explaining_order(runs, 5)]
    assert names == ["limited_mc_ns9", "standard_mc_ns9", "limited_mc_ns8"]


def test_a_hierarchical_run_counts_beside_others() -> None:
    runs = sweep(
        {"explainer_type": "hierarchical", "hierarchical": {"ks": 3, "shap_type": "exact"}},
        {"num_samples": 30},
    )
    both = expected_answers(runs, 9)
    assert max(run.coalitions(9) for run in runs) < both <= sum(run.coalitions(9) for run in runs)


def test_a_run_that_plans_too_many_coalitions_is_expected_to_cost_nothing() -> None:
    """It is refused when its row is read; its 2^2000 must not drown what the others need."""
    runs = sweep({"explainer_type": "exact"}, {"num_samples": [2100]})
    (unit,) = plan_units(runs, [0], {0: 2000}, {})
    assert unit.run_names == ("exact", "limited_mc_ns2100")
    assert unit.cost == 2100.0


def test_scouts_of_every_way_of_generating_go_early() -> None:
    """The longest unit comes first, then middling ones of other keys, twice; the rest longest first."""
    runs = sweep(
        {"explainer_type": "exact"},
        {"num_samples": [16], "name": "long", "generation_override": {"max_new_tokens": 64}},
        {"num_samples": [16], "name": "short", "generation_override": {"max_new_tokens": 7}},
    )
    rows = list(range(60))
    players = {row: 6 + row % 6 for row in rows}
    units = plan_units(runs, rows, players, {})
    exact = runs[0].cost_key
    assert units[0].cost == 2**11
    assert {unit.cost_key for unit in units[1:3]} == {run.cost_key for run in runs[1:]}
    second = [place for place, unit in enumerate(units[3:], start=3) if unit.cost_key != exact][:2]
    assert {units[place].cost_key for place in second} == {run.cost_key for run in runs[1:]}
    assert sum(unit.cost for unit in units[: second[-1]]) < 0.1 * sum(unit.cost for unit in units)
    rest = [unit.cost for place, unit in enumerate(units[3:], start=3) if place not in second]
    assert rest == sorted(rest, reverse=True)
    assert len({unit.unit_id for unit in units}) == len(units) == 180


def test_runs_that_draw_answers_of_their_own_cost_alike() -> None:
    """They share no answers, but what an answer costs is one thing to learn, and needs no scouts."""
    runs = sweep({"num_samples": [5, 6, 7]}, generation={"text_temperature": 1.0})
    assert len({run.generation_key for run in runs}) == 3
    assert len({run.cost_key for run in runs}) == 1
    units = plan_units(runs, [0, 1], {0: 4, 1: 6}, {})
    assert [unit.cost for unit in units] == sorted((unit.cost for unit in units), reverse=True)
    shared = sweep({"num_samples": [5]}, {"num_samples": [6], "generation_override": {"max_new_tokens": 9}})
    assert len({run.cost_key for run in shared}) == 2
    assert shared[0].cost_key == shared[0].generation_key


def test_nothing_left_needs_no_scouts() -> None:
    done = {run.name: {0} for run in GRID}
    assert plan_units(GRID, [0], {0: 4}, done) == []


def test_runs_that_force_a_text_need_one_answer_and_a_likelihood_per_coalition() -> None:
    """Runs on one text share its likelihoods, a contrast reads two texts, and answers come on top."""

    def forced(name: str, **options: Any) -> dict[str, Any]:
        shap = {"similarity": None, "value_function": name, "value_options": options or None}
        return {"explainer_type": "exact", "name": f"{name}{len(options)}", "shap_override": shap}

    logprob, jsd = forced("tf_logprob"), forced("tf_jsd")
    contrast = forced("contrastive", target="yes", foil="no")
    assert expected_answers(sweep(logprob), 6) == 1 + 64
    assert expected_answers(sweep(logprob, jsd), 6) == 1 + 64
    assert expected_answers(sweep(logprob, contrast), 6) == 1 + 64 + 2 * 64
    assert expected_answers(sweep({"explainer_type": "exact"}, jsd), 6) == 64 + 64
    assert expected_answers(sweep({"explainer_type": "exact"}, forced("self_logprob")), 6) == 64
    (unit,) = plan_units(sweep(logprob, jsd), [7], {7: 6}, {})
    assert unit.cost == 65.0
