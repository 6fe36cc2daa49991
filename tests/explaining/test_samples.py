"""What a sample says of its row."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from explaining_kit import WORDS, explain, row_of, runs_of

from mllm_shapx.errors import RowError
from mllm_shapx.explaining.similarity import Vector, build_similarity, euclidean
from mllm_shapx.models.base import Answer
from mllm_shapx.records.results import ASSISTANT, SYSTEM, USER, SampleResult


def test_pieces_of_each_turn_join_to_its_text_and_only_user_words_carry_values() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    sample = explain(row_of("Say  it , now !", "then stop"), run)
    system, first, second, answer = sample.conversation
    assert "".join(map(str, first[0].content)) == "Say  it , now !"
    assert "".join(map(str, second[0].content)) == "then stop"
    assert [
        first[0].content[index] for index, value in enumerate(first[0].shap_values or ()) if value is not None
    ] == [
        "Say",
        "  it",
        " now",
    ]
    assert (system[0].roles, system[0].shap_values) == ((SYSTEM,), None)
    assert set(first[0].roles) == {USER}
    assert (answer[0].roles, answer[0].content, answer[0].shap_values) == (
        (ASSISTANT,),
        (sample.response,),
        None,
    )
    assert sample.num_players == len(sample.player_values()) == 5


def test_without_a_system_prompt_turn_zero_is_empty() -> None:
    (run,) = runs_of({"explainer_type": "exact"}, chat={"system_prompt": ""})
    sample = explain(row_of("one two"), run)
    assert sample.conversation[0] == ()
    assert len(sample.conversation) == 3


def test_a_sample_survives_its_file() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    sample = explain(row_of(" ".join(WORDS[:4])), run)
    assert SampleResult.from_json(run.name, sample.to_json()) == sample


def test_the_system_prompt_is_never_a_player() -> None:
    (run,) = runs_of({"explainer_type": "exact"}, chat={"system_prompt": "Answer with even words"})
    assert explain(row_of("red fox"), run).num_players == 2


def test_a_row_of_punctuation_has_no_players() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    with pytest.raises(RowError) as caught:
        explain(row_of(" . ! "), run)
    assert caught.value.reason == "no_players"


def test_a_row_with_too_many_players_for_its_explainer_is_refused_in_words() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    with pytest.raises(RowError, match="hierarchical") as caught:
        explain(row_of(" ".join(f"w{index}" for index in range(30))), run)
    assert caught.value.reason == "too_many_players"


def test_seeds_hang_on_the_run_and_the_row_alone() -> None:
    runs = runs_of({"explainer_type": "limited_mc", "num_samples": [10, 20]})
    seeds = {(run.name, row): run.seed_for(row) for run in runs for row in range(50)}
    assert len(set(seeds.values())) == 100
    assert all(0 <= seed < 2**31 for seed in seeds.values())


def test_embedding_similarities_embed_each_distinct_answer_once() -> None:
    seen: list[str] = []

    async def embed(answers: Sequence[Answer]) -> list[Vector]:
        seen.extend(answer.text for answer in answers)
        return [np.array([len(answer.text), 1.0]) for answer in answers]

    similarity = build_similarity("EuclideanSimilarity", embed)
    base, other = Answer("abc"), Answer("abcde")
    scores = asyncio.run(similarity.score(base, [other, base, other]))
    assert scores == [1 / 3, 1.0, 1 / 3]
    assert sorted(seen) == ["abc", "abcde"]


def test_vectors_of_different_lengths_are_filled_with_zeros() -> None:
    assert euclidean(np.array([3.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert euclidean(np.zeros(0), np.array([1.0])) == pytest.approx(0.5)
