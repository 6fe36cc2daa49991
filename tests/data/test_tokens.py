"""Players of a text."""

import random
import time
import unicodedata

import pytest

from mllm_shapx.data.scripts import lacks_spaces
from mllm_shapx.data.tokens import count_players, player_spans
from mllm_shapx.planning.players import PlayerRule


@pytest.mark.parametrize(
    ("text", "players"),
    [
        ("Who are you ?", ["Who", "are", "you"]),
        ("wait ... what ?! - no", ["wait", "what", "no"]),
        ("...well, fine.", ["...well,", "fine."]),
        (" a\tb\n c ", ["a", "b", "c"]),
        ("?!;:,. ,", []),
        ("", []),
        ("¿Qué 'quoted' (x)", ["¿Qué", "'quoted'", "(x)"]),
        ("non\u00a0breaking\u3000space", ["non", "breaking", "space"]),
        ("a \u200b b \ufeff c \u2026 d \u3002 \uff0c e \u201c \u2014", ["a", "b", "c", "d", "e"]),
        ("a \x07 b \x00 \x7f c\u0301 \u0301", ["a", "b", "c\u0301"]),
        ("( ) \" ' - -- * ** _ / # & ... ¿ § •", []),
        (
            "5 € + → = ~ © 😀 1\ufe0f\u20e3 ½ Ⅳ 你好。",
            ["5", "€", "+", "→", "=", "~", "©", "😀", "1\ufe0f\u20e3", "½", "Ⅳ", "你好。"],
        ),
        ("\u200bword\u200b \ufeffx", ["\u200bword\u200b", "\ufeffx"]),
        ("one\u2028two\u202fthree\u0085four", ["one", "two", "three", "four"]),
    ],
)
def test_punctuation_words_are_no_players(text: str, players: list[str]) -> None:
    """`exclude_punctuation` leaves out the words without a letter, a number or a symbol."""
    spans = player_spans(text, PlayerRule())
    assert [text[start:end] for start, end in spans] == players
    assert count_players(text, PlayerRule()) == len(players)


def test_without_filter_every_word_is_a_player() -> None:
    """`none` keeps punctuation words."""
    assert player_spans("a . b", PlayerRule("none")) == [(0, 1), (2, 3), (4, 5)]


def test_counting_agrees_with_the_spans_on_every_character() -> None:
    """Both use one rule, so that the plan counts what is explained."""
    rng = random.Random(5)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(400):
        text = "".join(rng.choice(characters if rng.random() < 0.5 else " a.\u200b") for _ in range(40))
        for token_filter in ("exclude_punctuation", "none"):
            spans = player_spans(text, PlayerRule(token_filter))
            assert count_players(text, PlayerRule(token_filter)) == len(spans)
            assert [text[start:end] for start, end in spans] == [
                word
                for word in text.split()
                if token_filter == "none"  # noqa: S105
                or any(unicodedata.category(each)[0] in "LNS" for each in word)
            ]


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("今天天气怎么样", True),
        ("今天 天气 怎么样", False),
        ("你好", False),
        ("私は昨日学校へ行きました。そして本を読みました。", True),
        ("วันนี้อากาศดีมากเราไปเที่ยวกันไหม", True),
        ("วันนี้ อากาศ ดี มาก เรา ไป เที่ยว กัน ไหม", False),
        ("ມື້ນີ້ອາກາດດີຫຼາຍພວກເຮົາໄປທ່ຽວ", True),
        ("ថ្ងៃនេះអាកាសធាតុល្អណាស់យើងទៅលេង", True),
        ("ဒီနေ့ရာသီဥတုအရမ်းကောင်းတယ်", True),
        ("오늘 날씨가 정말 좋네요", False),
        ("please translate 今天天气怎么样 into good English for my friend", False),
        ("Donaudampfschifffahrtsgesellschaft", False),
        ("", False),
    ],
)
def test_texts_without_spaces_between_words_are_known(text: str, lacking: bool) -> None:
    """A sentence that is one player is told from words that a segmenter divided."""
    assert lacks_spaces(text, count_players(text, PlayerRule())) is lacking


def test_a_hundred_thousand_rows_are_counted_in_seconds() -> None:
    """Counting scales to large shards, long runs of punctuation included."""
    text = "the quick brown fox , jumps over the lazy dog ! " + "." * 50
    started = time.perf_counter()
    assert sum(count_players(text, PlayerRule()) for _ in range(100_000)) == 900_000
    assert time.perf_counter() - started < 5
