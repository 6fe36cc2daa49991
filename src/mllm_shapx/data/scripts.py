"""Detects scripts without spaces between words: there, a "word" between spaces is a whole sentence."""

import re

LETTERS_PER_PLAYER = 6
"""Largest mean letters per player of a text whose words are separated by spaces."""

_UNSPACED = re.compile(
    "["
    "\u0e00-\u0e7f"  # Thai
    "\u0e80-\u0eff"  # Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf"  # Tai Le, New Tai Lue, Tai Tham
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3100-\u312f"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "]"
)


def lacks_spaces(text: str, num_players: int) -> bool:
    """Return whether most of `text` is in such a script and its `num_players` players are longer than words.

    False for a text whose words already have spaces between them.
    """
    if text.isascii() or not num_players:
        return False
    letters = sum(map(str.isalpha, _UNSPACED.findall(text)))
    return letters > LETTERS_PER_PLAYER * num_players and 2 * letters >= sum(map(str.isalpha, text))
