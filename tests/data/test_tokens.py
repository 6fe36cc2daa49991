"""Players of a text."""

import time

import pytest

from mllm_shapx.data.tokens import count_players, player_spans


@pytest.mark.parametrize(
    ("text", "players"),
    [
        ("Who are you ?", ["Who", "are", "you"]),
        ("wait ... what ?! - no", ["wait", "what", "-", "no"]),
        ("...well, fine.", ["...well,", "fine."]),
        (" a\tb\n c ", ["a", "b", "c"]),
        ("?!;:,. ,", []),
        ("", []),
        ("¿Qué 'quoted' (x)", ["¿Qué", "'quoted'", "(x)"]),
        ("non\u00a0breaking\u3000space", ["non", "breaking", "space"]),
    ],
)
def test_punctuation_words_are_no_players(text: str, players: list[str]) -> None:
    """`exclude_punctuation` leaves out exactly the words made of . , ! ? ; : alone."""
    spans = player_spans(text, "exclude_punctuation")
    assert [text[start:end] for start, end in spans] == players
    assert count_players(text, "exclude_punctuation") == len(players)


def test_without_filter_every_word_is_a_player() -> None:
    """`none` keeps punctuation words."""
    assert player_spans("a . b", "none") == [(0, 1), (2, 3), (4, 5)]


def test_spans_agree_with_splitting() -> None:
    """The one regular expression finds the words that splitting and stripping finds."""
    texts = ["a .b ..c. d:e :", "!!x?? ; y;z ,,", "π , — :)", ": ) :)"]
    for text in texts:
        by_splitting = [word for word in text.split() if word.strip(".,!?;:")]
        assert [text[s:e] for s, e in player_spans(text, "exclude_punctuation")] == by_splitting


def test_a_hundred_thousand_rows_are_counted_in_seconds() -> None:
    """Counting scales to large shards, long runs of punctuation included."""
    text = "the quick brown fox , jumps over the lazy dog ! " + "." * 50
    started = time.perf_counter()
    assert sum(count_players(text, "exclude_punctuation") for _ in range(100_000)) == 900_000
    assert time.perf_counter() - started < 5
