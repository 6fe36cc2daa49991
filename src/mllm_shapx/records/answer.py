"""The answer to one coalition: one type from the model to the disk."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

Ending = Literal["refusal", "content_filter", "empty"]
"""Unusual reason why a server ended an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one prompt."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Generated text tokens, the end token included when it was generated."""
    logprobs: tuple[float, ...] | None = None
    """Natural-log probability of each of `token_ids` before temperature and top-k; None unless requested."""
    audio_frames: tuple[tuple[int, ...], ...] = ()
    """Generated audio frames, one code per codebook."""
    ending: Ending | None = None
    """Unusual reason why a server ended the answer; None for an end token or the token limit."""
    reasoning: str = ""
    """Reasoning that a server sent separately from the text; never scored."""
    tokens_in: int | None = None
    """Tokens of the prompt as counted by a server; None without a count, and for local models."""
    tokens_out: int | None = None
    """Tokens that a server generated for the answer, reasoning included."""
    asked_by: str = ""
    """Name of the first run that needed it. Empty for an answer without a run yet, and for a copy of the
    answer to another coalition. Stored, so that `model_calls` of a resumed run equals that of an
    uninterrupted run."""

    @property
    def content_id(self) -> bytes:
        """Return 16 bytes, equal for answers of equal content; the key of its embeddings."""
        content = json.dumps([self.text, self.token_ids, self.audio_frames]).encode()
        return hashlib.blake2b(content, digest_size=16).digest()
