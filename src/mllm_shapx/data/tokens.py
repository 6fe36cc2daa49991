"""Which words of a text are players: shared by the row selection and the player partition."""

import re

_PUNCTUATION = ".,!?;:"
_WORD = re.compile(r"\S+")
# From a word's start: leading punctuation, one character that is neither punctuation nor space, and the rest.
# Words made of punctuation alone do not match; the atomic group and the start keep long runs of it linear.
_WORD_NOT_PUNCTUATION = re.compile(r"(?<!\S)(?>[.,!?;:]*)[^\s.,!?;:]\S*")


def player_spans(text: str, token_filter: str) -> list[tuple[int, int]]:
    """Return `[start, end)` character offsets of the players of `text`, in order.

    Players are whitespace-separated words; `exclude_punctuation` leaves out the words made only of
    `. , ! ? ; :`, `none` keeps all.
    """
    pattern = _WORD_NOT_PUNCTUATION if _filters(token_filter) else _WORD
    return [match.span() for match in pattern.finditer(text)]


def count_players(text: str, token_filter: str) -> int:
    """Return `len(player_spans(text, token_filter))`, several times as fast."""
    words = text.split()
    return len([word for word in words if word.strip(_PUNCTUATION)]) if _filters(token_filter) else len(words)


def _filters(token_filter: str) -> bool:
    return token_filter == "exclude_punctuation"  # noqa: S105
