"""What a sample says of its row."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from explaining_kit import WORDS, explain, row_of, runs_of

from mllm_shapx.config.vocabulary import SIMILARITIES
from mllm_shapx.data.tokens import count_players
from mllm_shapx.errors import RowError
from mllm_shapx.explaining.similarity import Vector, build_similarity, euclidean
from mllm_shapx.models.base import Answer
from mllm_shapx.records.results import ASSISTANT, SYSTEM, USER, SampleResult
from mllm_shapx.records.storage import encode_json


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


ODD = [
    "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "1\ufe0f\u20e3", "e\u0301", "\u0301", "\u0928\u093f",
    "\u200b", "\ufeff", "\u2026", "。", "\uff0c", "“", "—", "\x00", "\x07", "\x1c", "\x7f", "\u0085",
    "\u00a0", "\u202f", "\u2028", "\u2029", "\u3000", "\r\n", "\t", " ", " ", "a", "word", "你好",
    "\u202eabc\u202c", "\U000e0001", "\ue000", "<|im_end|>",
]  # fmt: skip


@pytest.mark.parametrize("token_filter", ["exclude_punctuation", "none"])
def test_pieces_of_any_text_join_to_it_and_players_are_those_that_the_selection_counts(
    token_filter: str,
) -> None:
    (run,) = runs_of({"num_samples": [-1]}, shap={"token_filter": token_filter})
    rng = random.Random(11)
    for _ in range(60):
        texts = ["".join(rng.choices(ODD, k=rng.randint(1, 14))) + " end" for _ in range(rng.randint(1, 2))]
        sample = explain(row_of(*texts), run)
        users = sample.conversation[1:-1]
        assert ["".join(map(str, turn[0].content)) for turn in users] == texts
        assert sample.num_players == sum(count_players(text, run.player_rule) for text in texts)
        reread = SampleResult.from_bytes(run.name, encode_json(sample.to_json()))
        assert reread.conversation == sample.conversation


def test_a_piece_without_letter_number_or_symbol_is_no_player() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    sample = explain(row_of("\ufeff red \u200b \u2026 。 \uff0c “ — \x07 fox 😀"), run)
    pieces = sample.conversation[1][0]
    players = [
        str(piece).strip()
        for piece, value in zip(pieces.content, pieces.shap_values or (), strict=True)
        if value is not None
    ]
    assert players == ["red", "fox", "😀"]
    assert sample.num_players == 3


def test_an_empty_system_prompt_is_still_turn_zero() -> None:
    (run,) = runs_of({"explainer_type": "exact"}, chat={"system_prompt": ""})
    conversation = explain(row_of("one two"), run).to_json()["conversation"]
    assert conversation[0] == [{"content_type": 0, "roles": [2], "content": [""], "shap_values": None}]
    assert len(conversation) == 3


def test_raw_values_keep_the_sign_that_a_normalizer_takes() -> None:
    runs = runs_of(
        *(
            {"explainer_type": "exact", "name": name, "shap_override": {"normalizer": name}}
            for name in ("IdentityNormalizer", "MinMaxNormalizer", "PowerShiftNormalizer")
        )
    )
    # The answer to "red" alone is "nothing", to "lazy" alone it is "lazy": values of both signs.
    plain, *normalized = (explain(row_of("red lazy fox"), run) for run in runs)
    assert plain.raw_values == tuple(plain.player_values())
    assert min(plain.raw_values or ()) < 0 < max(plain.raw_values or ())
    for sample in normalized:
        assert sample.raw_values == plain.raw_values
        assert min(value for value in sample.player_values() if value is not None) >= 0
        assert sum(sample.raw_values or ()) == pytest.approx(sample.grand_value - sample.base_value)


@pytest.mark.parametrize(
    ("variant", "steps"),
    [
        ({"explainer_type": "limited_neyman", "num_samples": 10}, 2),
        ({"explainer_type": "standard_neyman", "num_samples": 10}, 2),
        ({"explainer_type": "limited_cc", "num_samples": 10}, None),
        ({"explainer_type": "exact"}, None),
        ({"explainer_type": "hierarchical", "hierarchical": {"ks": [2], "shap_type": "neyman"}}, None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_neyman_steps_are_in_every_sample(variant: dict[str, Any], steps: int | None) -> None:
    (run,) = runs_of(variant)
    data = explain(row_of("red lazy fox jumps"), run).to_json()
    assert "neyman_steps" in data
    assert data["neyman_steps"] == steps
    assert len(data["raw_values"]) == data["num_players"] == 4


def test_each_seed_draws_its_own_coalitions_and_gives_its_own_values() -> None:
    words = " ".join(WORDS[:8])
    runs = runs_of({"num_samples": 20, "seeds": [0, 1]}, {"num_samples": 20})
    samples = [explain(row_of(words), run) for run in runs]
    assert len({sample.seed for sample in samples}) == 3
    assert len({sample.raw_values for sample in samples}) == 3
    assert explain(row_of(words), runs[0]).raw_values == samples[0].raw_values


def test_a_sample_survives_its_file() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    sample = explain(row_of(" ".join(WORDS[:4])), run)
    assert SampleResult.from_bytes(run.name, encode_json(sample.to_json())) == sample


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


def test_seeds_depend_on_the_run_and_the_row_alone() -> None:
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


def test_every_similarity_that_a_config_can_name_scores_an_answer_as_equal_to_itself() -> None:
    async def embed(answers: Sequence[Answer]) -> list[Vector]:
        return [np.array([len(answer.text), 1.0]) for answer in answers]

    base = Answer("red ferry")
    for name in SIMILARITIES:
        same, other = asyncio.run(build_similarity(name, embed).score(base, [base, Answer("blue")]))
        assert same == pytest.approx(1.0), name
        assert other < same, name
    with pytest.raises(KeyError):
        build_similarity("OtherSimilarity", embed)


def test_vectors_of_different_lengths_are_filled_with_zeros() -> None:
    assert euclidean(np.array([3.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert euclidean(np.zeros(0), np.array([1.0])) == pytest.approx(0.5)
