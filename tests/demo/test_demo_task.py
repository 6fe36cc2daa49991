"""The little language of the demo."""

import random

import pytest
from demo_task import (
    ENGLISH,
    LANGUAGES,
    ROWS_PER_LANGUAGE,
    answer_to,
    demo_prompts,
    draw_coalition,
    draw_prompt,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("kindly tell our sailor about the harbor today", "gladly ships wait near long piers today"),
        ("today harbor", "ships wait near long piers today"),
        ("kindly tell our sailor", "gladly nothing special comes to mind"),
        ("", "nothing special comes to mind"),
        ("bitte", "gern dazu weiß ich gar nichts"),
        ("o pszczołach", "złoty miód powoli spływa z plastra"),
        ("words nobody taught it", "nothing special comes to mind"),
    ],
)
def test_answer_hangs_on_the_words_that_are_left(text: str, answer: str) -> None:
    assert answer_to(text.split()) == answer


def test_no_word_belongs_to_two_languages() -> None:
    """Any word alone tells the language, so that a coalition's answer is never a matter of taste."""
    words = [word for language in LANGUAGES for word in language.words()]
    assert len(words) == len(set(words))


def test_planted_sentences_share_no_word_with_the_neutral_one() -> None:
    """The planted word's effect is as large as an answer's similarity can change."""
    for language in LANGUAGES:
        neutral = set(language.neutral.split())
        assert all(neutral.isdisjoint(sentence.split()) for sentence in language.sentences.values())


def test_drawn_prompts_are_short_and_name_their_planted_word_once() -> None:
    rng = random.Random(0)
    for language in LANGUAGES * 100:
        prompt = draw_prompt(rng, language)
        assert 6 <= len(prompt.words) <= 9
        assert len(set(prompt.words)) == len(prompt.words)
        assert [word for word in prompt.words if word in language.sentences] == [prompt.planted_word]
        assert prompt.words[prompt.planted_index] == prompt.planted_word


def test_coalitions_keep_the_order_and_reach_from_none_to_all() -> None:
    rng = random.Random(0)
    words = draw_prompt(rng, ENGLISH).words
    drawn = [draw_coalition(rng, words) for _ in range(300)]
    assert all(list(some) == sorted(some, key=words.index) for some in drawn)
    assert {len(some) for some in drawn} == set(range(len(words) + 1))


def test_rows_come_from_the_seed_alone() -> None:
    rows = demo_prompts(3)
    assert rows == demo_prompts(3)
    assert rows != demo_prompts(4)
    assert len({row.text for row in rows}) == len(rows) == sum(ROWS_PER_LANGUAGE.values())
