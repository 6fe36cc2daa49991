"""What a run measures beside its values: faithfulness curves and interactions."""

import asyncio
from collections.abc import Callable, Mapping
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from explaining_kit import WORDS, Generator, answer_text, explain, row_of, runs_of
from mllm_shap import ConversationSnapshot
from shapiq import ExactComputer

from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.similarity import TfIdfCosine
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.storage import encode_json

PROMPT = " ".join(WORDS[:6])


def run_of(**keys: Any) -> RunSpec:
    (run,) = runs_of({"explainer_type": "exact", **keys})
    return run


class FindsTheFox(Generator):
    """Answers what the prompt says of a fox: one word is all that matters."""

    async def __call__(self, prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
        for mask, snapshot in prompts.items():
            self.asked.append(mask)
            text = " ".join(message.text for message in snapshot.messages())
            keep(mask, Answer("found" if "fox" in text.split() else "nothing"))


# --- interactions


def value_table(prompt: str) -> list[float]:
    """Return the value of every coalition, from prompts and similarities that are made here."""
    words = prompt.split()
    row = open_row(row_of(prompt), run_of())
    answers = [Answer(answer_text(row.render(mask))) for mask in range(1 << len(words))]
    return asyncio.run(TfIdfCosine().score(answers[-1], answers))


def game_of(table: list[float]) -> Callable[[Any], Any]:
    """Return the same values as a game for shapiq, which asks by rows of present players."""

    def values(coalitions: Any) -> Any:
        return np.array([table[sum(1 << int(place) for place in np.flatnonzero(row))] for row in coalitions])

    return values


@pytest.mark.parametrize("index", ["k-SII", "SII", "STII", "BII"])
@pytest.mark.parametrize("order", [2, 3])
def test_interactions_are_shapiq_s_own_on_the_same_game(index: str, order: int) -> None:
    generator = Generator()
    run = run_of(interactions={"index": index, "order": order})
    found = explain(row_of(PROMPT), run, generator=generator).interactions
    assert found is not None
    expected = ExactComputer(game_of(value_table(PROMPT)), n_players=6)(index, order)
    sets = [each for size in range(1, order + 1) for each in combinations(range(6), size)]
    assert list(found.players) == sets
    assert found.values == pytest.approx([expected[each] for each in sets], abs=1e-9)
    assert max(map(abs, found.values)) > 0.01
    assert len(generator.asked) == 1 << 6


def test_pairs_are_the_second_differences_that_their_definition_says() -> None:
    """SII: the mean over orders of the players, the pair as one, of v(Tij) - v(Ti) - v(Tj) + v(T)."""
    prompt = " ".join(WORDS[:5])
    table = value_table(prompt)
    found = explain(row_of(prompt), run_of(interactions={"index": "SII"})).interactions
    assert found is not None
    value_of = dict(zip(found.players, found.values, strict=True))
    for i, j in combinations(range(5), 2):
        others = [player for player in range(5) if player not in {i, j}]
        differences = []
        for order in permutations([*others, -1]):  # -1 stands for the pair
            before = sum(1 << player for player in order[: order.index(-1)])
            one, other = before | 1 << i, before | 1 << j
            differences.append(table[one | other] - table[one] - table[other] + table[before])
        assert value_of[i, j] == pytest.approx(sum(differences) / len(differences), abs=1e-9)


def test_single_values_and_pairs_share_out_what_the_whole_prompt_is_worth() -> None:
    sample = explain(row_of(PROMPT), run_of(interactions={}))
    assert sample.interactions is not None
    assert (sample.interactions.index, sample.interactions.order) == ("k-SII", 2)
    gain = sample.grand_value - sample.base_value
    assert sum(sample.interactions.values) == pytest.approx(gain, abs=1e-9)


def test_a_row_of_one_player_has_no_pair() -> None:
    sample = explain(row_of("fox"), run_of(interactions={}))
    assert sample.interactions is not None
    assert sample.interactions.players == ((0,),)
    assert sample.interactions.values == pytest.approx(sample.raw_values)


# --- faithfulness


def test_the_curves_of_a_game_in_which_one_word_matters() -> None:
    """The answer is lost with the first deletion and comes back with the first word kept."""
    run = run_of(faithfulness={"steps": 10, "random": 4})
    sample = explain(row_of("the red fox jumps"), run, generator=FindsTheFox())
    found = sample.faithfulness
    assert found is not None
    assert found.kept == (0, 1, 2, 3, 4)
    assert found.deletion == pytest.approx((0, 0, 0, 0, 1))
    assert found.insertion == pytest.approx((0, 1, 1, 1, 1))
    assert (found.areas.deletion, found.areas.insertion) == pytest.approx((1 / 8, 7 / 8))
    # In a random order the answer comes back with the fox, whichever place it has.
    assert len(found.random) == 4
    assert len(set(found.random)) > 1
    backs = [curve.index(max(curve)) for curve in found.random]
    for curve, back in zip(found.random, backs, strict=True):
        assert curve == pytest.approx([float(number >= back > 0) for number in found.kept])
    assert found.areas.random == pytest.approx(sum(4.5 - back for back in backs) / 16)
    assert found.areas.deletion_is_better == any(back < 4 for back in backs)
    assert found.areas.insertion_is_better == any(back > 1 for back in backs)


@pytest.mark.parametrize(
    ("steps", "kept", "area"), [(1, (0, 6), 1 / 2), (2, (0, 3, 6), 1 / 4), (4, (0, 2, 3, 5, 6), 1 / 12)]
)
def test_steps_are_whole_players(steps: int, kept: tuple[int, ...], area: float) -> None:
    """The area is that between the last two points, since the answer is lost with the first deletion."""
    run = run_of(faithfulness={"steps": steps, "random": 1})
    found = explain(row_of("the red fox jumps over dogs"), run, generator=FindsTheFox()).faithfulness
    assert found is not None
    assert found.kept == kept
    assert found.areas.deletion == pytest.approx(area)


def test_where_no_player_matters_nothing_is_better_than_random() -> None:
    run = run_of(faithfulness={})
    areas = explain(row_of("the dogs jump"), run, generator=FindsTheFox()).faithfulness
    assert areas is not None
    assert (areas.areas.deletion, areas.areas.insertion, areas.areas.random) == pytest.approx((1, 1, 1))
    assert not areas.areas.deletion_is_better
    assert not areas.areas.insertion_is_better


@pytest.mark.parametrize(
    "variant",
    [
        {"explainer_type": "limited_mc", "num_samples": [20]},
        {"explainer_type": "limited_neyman", "num_samples": [30]},
        {"explainer_type": "hierarchical", "hierarchical": {"ks": [3]}},
        {"explainer_type": "loo"},
    ],
    ids=lambda variant: str(variant["explainer_type"]),
)
def test_only_coalitions_without_an_answer_are_asked_and_all_are_counted(variant: dict[str, Any]) -> None:
    """Alone, a run asks for its curves, no more than planned; beside an exact run they cost nothing."""
    prompt = " ".join(WORDS[:9])
    (plain,), (measured,) = runs_of(variant), runs_of({**variant, "faithfulness": {}})
    without, alone = Generator(), Generator()
    before = explain(row_of(prompt), plain, generator=without)
    sample = explain(row_of(prompt), measured, generator=alone)
    assert len(alone.asked) == len(set(alone.asked)) == sample.n_calls == sample.model_calls
    assert sample.n_calls <= measured.coalitions(9)
    assert sample.raw_values == before.raw_values
    assert set(without.asked) <= set(alone.asked)
    assert plain.coalitions(9) < measured.coalitions(9) <= plain.coalitions(9) + 7 * 8
    beside, row = Generator(), row_of(prompt)
    shared = open_row(row, measured)
    explain(row, run_of(), shared, beside)
    again = explain(row, measured, shared, beside)
    assert len(beside.asked) == 1 << 9
    assert (again.model_calls, again.n_calls) == (0, sample.n_calls)
    assert again.faithfulness == sample.faithfulness


def test_random_orders_depend_on_run_and_row_alone() -> None:
    one, other = runs_of(
        {"explainer_type": "exact", "name": "one"}, {"explainer_type": "exact", "name": "other"},
        faithfulness={"random": 3},
    )  # fmt: skip

    def drawn(run: RunSpec, row_index: int) -> object:
        found = explain(row_of(PROMPT, row_index=row_index), run).faithfulness
        assert found is not None
        return found.random

    assert drawn(one, 0) == drawn(one, 0)
    assert drawn(one, 0) != drawn(one, 1)
    assert drawn(one, 0) != drawn(other, 0)


def test_both_survive_the_file() -> None:
    sample = explain(row_of(PROMPT), run_of(interactions={}, faithfulness={}))
    data = sample.to_json()
    assert set(data["faithfulness"]) == {"kept", "deletion", "insertion", "random", "areas"}
    assert SampleResult.from_bytes("exact", encode_json(data)) == sample
