"""Which words of a text are players: shared by the row selection and the player partition."""

import re
import unicodedata

_WORD = re.compile(r"\S+")
_PLAYING = frozenset("LNS")
"""First letters of the Unicode categories of letters, numbers and symbols."""


class _Playing(dict[str, bool]):
    """Character -> whether a word that holds it is a player; filled when a character first occurs."""

    def __missing__(self, character: str) -> bool:
        found = self[character] = unicodedata.category(character)[0] in _PLAYING
        return found


_plays = _Playing().__getitem__


def player_spans(text: str, token_filter: str) -> list[tuple[int, int]]:
    """Return `[start, end)` character offsets of the players of `text`, in order.

    Players are whitespace-separated words. `exclude_punctuation` leaves out the words without a letter, a
    number or a symbol of their own (Unicode categories L, N and S): words made of punctuation, of invisible
    or control characters, or of combining marks alone. `none` keeps all words.
    """
    words = _WORD.finditer(text)
    if _filters(token_filter):
        return [match.span() for match in words if _is_player(match.group())]
    return [match.span() for match in words]


def count_players(text: str, token_filter: str) -> int:
    """Return `len(player_spans(text, token_filter))`, faster."""
    words = text.split()
    return sum(map(_is_player, words)) if _filters(token_filter) else len(words)


def _is_player(word: str) -> bool:
    return any(map(_plays, word))


def _filters(token_filter: str) -> bool:
    return token_filter == "exclude_punctuation"  # noqa: S105
