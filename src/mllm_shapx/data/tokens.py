"""Which words of a text are players: shared by the row selection and the player partition."""

import re

_WORD = re.compile(r"\S+")
# From a word's start: leading punctuation, one character that is neither punctuation nor space, and the rest.
# Words made of punctuation alone do not match; the atomic group and the start keep long runs of it linear.
_WORD_NOT_PUNCTUATION = re.compile(r"(?<!\S)(?>[.,!?;:]*)[^\s.,!?;:]\S*")


def player_spans(text: str, token_filter: str) -> list[tuple[int, int]]:
    """Return `[start, end)` character offsets of the players of `text`, in order.

    Players are whitespace-separated words; `exclude_punctuation` leaves out the words made only of
    `. , ! ? ; :`, `none` keeps all.
    """
    return [match.span() for match in _pattern(token_filter).finditer(text)]


def count_players(text: str, token_filter: str) -> int:
    """Return `len(player_spans(text, token_filter))`, faster."""
    return len(_pattern(token_filter).findall(text))


def _pattern(token_filter: str) -> re.Pattern[str]:
    return _WORD_NOT_PUNCTUATION if token_filter == "exclude_punctuation" else _WORD  # noqa: S105
