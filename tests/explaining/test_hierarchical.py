"""Groups first, then their members: few coalitions, and the shares add up."""

import pytest
from explaining_kit import Generator, explain, row_of, runs_of

from mllm_shapx.explaining.hierarchical import fit_to_share, message_blocks, split
from mllm_shapx.explaining.sample import open_row

LONG = " ".join(f"{'word' if index % 3 else 'odd'}{index}" for index in range(20))


def hierarchical(**block: object) -> dict[str, object]:
    return {"explainer_type": "hierarchical", "hierarchical": {"ks": [5], "shap_type": "exact", **block}}


def test_the_values_of_all_players_sum_to_the_value_of_the_whole_prompt() -> None:
    (run,) = runs_of(hierarchical(), shap={"normalizer": "IdentityNormalizer"})
    sample = explain(row_of(LONG), run)
    assert sample.num_players == 20
    assert sum(value or 0.0 for value in sample.player_values()) == pytest.approx(
        sample.grand_value - sample.base_value
    )
    assert sample.num_levels == 2


def test_it_asks_for_far_fewer_coalitions_than_the_exact_game() -> None:
    (run,) = runs_of(hierarchical())
    generator = Generator()
    sample = explain(row_of(LONG), run, generator=generator)
    assert sample.n_calls <= 2**4 + 4 * 2**5
    assert len(generator.asked) == sample.model_calls


def test_as_many_players_as_fit_in_one_game_are_explained_exactly() -> None:
    exact, tree = runs_of({"explainer_type": "exact"}, hierarchical(ks=[8]))
    row = row_of("red fox jumps over lazy dogs")
    assert explain(row, tree).player_values() == explain(row, exact).player_values()


def test_groups_never_span_two_messages() -> None:
    (run,) = runs_of(hierarchical())
    players = open_row(row_of("a b c", "d e f g h i j"), run).players
    blocks = message_blocks(players)
    assert blocks == [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9]]
    assert split(blocks, 5) == [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]


def test_a_prompt_of_many_levels_is_opened_down_to_single_players() -> None:
    (run,) = runs_of(hierarchical(ks=[2]))
    sample = explain(row_of(" ".join(f"w{index}" * (1 + index % 2) for index in range(9))), run)
    assert len(sample.player_values()) == 9
    assert sample.num_levels == 4


def test_shares_are_fitted_in_proportion_and_null_players_stay_null() -> None:
    assert fit_to_share([0.2, 0.0, -0.1], 0.4) == pytest.approx([0.4, 0.0, 0.0])
    assert sum(fit_to_share([0.3, 0.1], 1.0)) == pytest.approx(1.0)
    assert fit_to_share([0.0, 0.0], 0.6) == [0.3, 0.3]


def test_lower_budgets_shrink_with_the_share_and_not_under_the_minimum() -> None:
    grid = hierarchical(shap_type="limited_mc", shap_num_samples=[32], first_layer_type="exact")
    shrinking, full = runs_of(
        grid, {**hierarchical(shap_type="limited_mc", shap_num_samples=[32], first_layer_type="exact",
                              use_importance_sampling=False), "name": "full"}
    )  # fmt: skip
    row = row_of(LONG)
    assert explain(row, shrinking).n_calls < explain(row, full).n_calls


def test_the_same_seed_gives_the_same_values() -> None:
    (run,) = runs_of(hierarchical(shap_type="limited_mc", shap_num_samples=[16]))
    assert explain(row_of(LONG), run).player_values() == explain(row_of(LONG), run).player_values()
