"""The prompt of a sample: pieces of text and sound, each with its value."""

import string
from dataclasses import dataclass

from mllm_shapx.records.results import AUDIO, USER, SampleResult


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of the user's messages."""

    text: str
    """The text with its blanks; for sound the spoken word, empty where that is not known."""
    num_bytes: int | None
    """Length of a piece of sound, None for text."""
    value: float | None
    """Its attribution; None where it is no player or the value is not finite."""
    turn: int
    """The turn of the conversation that it belongs to, from 0."""
    entry: int
    """Its entry in the turn, from 0: a recording, or the text beside it."""

    @property
    def label(self) -> str:
        """The piece in one short word."""
        return self.text.strip() or ("" if self.num_bytes is None else "♪")

    @property
    def modality(self) -> str:
        """`text` or `audio`."""
        return "text" if self.num_bytes is None else "audio"


def prompt_pieces(sample: SampleResult) -> list[Piece]:
    """Return the user's pieces in the order of the conversation."""
    pieces = []
    for turn, entries in enumerate(sample.conversation):
        for place, entry in enumerate(entries):
            values = entry.shap_values or (None,) * len(entry.content)
            for role, content, value in zip(entry.roles, entry.content, values, strict=True):
                if role != USER:
                    continue
                if isinstance(content, str):
                    sound = entry.content_type == AUDIO
                    pieces.append(Piece("" if sound else content, 0 if sound else None, value, turn, place))
                else:
                    pieces.append(Piece(content.text or "", content.num_bytes, value, turn, place))
    return pieces


def rank_of(word: str, pieces: list[Piece]) -> tuple[int, int] | None:
    """Return the rank of a word among the players and their number; None when it is no player.

    Rank 1 is the largest value; equal values share the better rank. Case and punctuation around a word do
    not matter; of several pieces that match, the best counts. A mark of several words matches any of them.
    """
    values = [piece.value for piece in pieces if piece.value is not None]
    wanted = {_bare(part) for part in word.split()} or {_bare(word)}
    matching = [
        piece.value
        for piece in pieces
        if piece.value is not None and piece.num_bytes is None and _bare(piece.text) in wanted
    ]
    if not matching:
        return None
    best = max(matching)
    return 1 + sum(value > best for value in values), len(values)


def _bare(word: str) -> str:
    return word.strip().strip(string.punctuation + "“”„«»…").casefold()
