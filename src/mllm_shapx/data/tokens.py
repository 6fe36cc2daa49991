"""Finds the players of a text, for the row selection and the player partition."""

import re
import unicodedata
from collections.abc import Callable, Iterable

from mllm_shapx.planning.players import PlayerRule, bare

Spans = list[tuple[int, int]]
"""`[start, end)` character offsets, in order."""

_WORD = re.compile(r"\S+")
_PARAGRAPH = re.compile(r"(?:[^\n]|\n(?!\s*\n))+")
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)
"""As mllm_shap's `sentences`: up to . ! or ? before white space, or to the end of the paragraph."""
_PLAYING = frozenset("LNS")
"""First letters of the Unicode categories of letters, numbers and symbols."""


class _Playing(dict[str, bool]):
    """Character -> whether it makes a piece a player; filled on demand."""

    def __missing__(self, character: str) -> bool:
        found = self[character] = unicodedata.category(character)[0] in _PLAYING
        return found


_plays = _Playing().__getitem__


def player_spans(text: str, rule: PlayerRule) -> Spans:
    """Return the players of `text` under `rule`.

    Words are separated by white space, sentences end as in mllm_shap, tokens are the model's, and a message
    is the whole text. `exclude_punctuation` drops pieces without a letter, a number or a symbol (Unicode
    categories L, N and S): pieces of only punctuation, invisible or control characters, or combining marks.
    `none` keeps all. Kept words are not players.

    Raises:
        ModelError: When the tokenizer of token players cannot be loaded.
    """
    spans = _pieces(rule)(text)
    if _filters(rule):
        spans = [(start, end) for start, end in spans if _is_player(text[start:end])]
    if rule.kept_words:
        spans = [(start, end) for start, end in spans if bare(text[start:end]) not in rule.kept_words]
    return spans


def count_players(text: str, rule: PlayerRule) -> int:
    """Return `len(player_spans(text, rule))`, faster for words."""
    if rule.kind != "words" or rule.kept_words:
        return len(player_spans(text, rule))
    words = text.split()
    return sum(map(_is_player, words)) if _filters(rule) else len(words)


def row_players(texts: Iterable[str], rule: PlayerRule) -> int:
    """Return the number of a row's players in its user messages `texts` and in the system prompt."""
    own = sum(count_players(text, rule) for text in texts) if "user" in rule.roles else 0
    return own + (count_players(rule.system_prompt, rule) if rule.system_prompt else 0)


def _pieces(rule: PlayerRule) -> Callable[[str], Spans]:
    if rule.kind == "tokens" and rule.tokenizer is not None:
        from mllm_shapx.models.text_tokens import token_spans

        return token_spans(rule.tokenizer)
    return {"words": _words, "sentences": _sentences, "messages": _message}[rule.kind]


def _words(text: str) -> Spans:
    return [match.span() for match in _WORD.finditer(text)]


def _sentences(text: str) -> Spans:
    return [
        (
            paragraph.start() + found.start(),
            paragraph.start() + len(paragraph.group()[: found.end()].rstrip()),
        )
        for paragraph in _PARAGRAPH.finditer(text)
        for found in _SENTENCE.finditer(paragraph.group())
    ]


def _message(text: str) -> Spans:
    return [(0, len(text))] if text else []


def _is_player(piece: str) -> bool:
    return any(map(_plays, piece))


def _filters(rule: PlayerRule) -> bool:
    return rule.token_filter == "exclude_punctuation"  # noqa: S105
