"""The answer to one coalition: one type from the model to the disk."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

Ending = Literal["refusal", "content_filter", "empty"]
"""What is unusual in how a server ended an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Generated text tokens, the end token included when it was generated."""
    logprobs: tuple[float, ...] | None = None
    """Natural-log probability of each of `token_ids` before temperature and top-k; None: not asked for."""
    audio_frames: tuple[tuple[int, ...], ...] = ()
    """Generated audio frames, one code per codebook."""
    ending: Ending | None = None
    """What is unusual in how a server ended the answer; None for an end token or the limit of tokens."""
    reasoning: str = ""
    """Reasoning that a server sent apart from the text; it is never scored."""
    tokens_in: int | None = None
    """Tokens of the prompt as a server counted them; None where it did not, and for models of our own."""
    tokens_out: int | None = None
    """Tokens that a server generated for the answer, reasoning included."""
    asked_by: str = ""
    """Name of the run that first needed it. Empty for an answer without a run yet, and for a copy of the
    answer to another coalition. It is stored, so that `model_calls` of a resumed run is what the undisturbed
    run would have counted."""

    @property
    def content_id(self) -> bytes:
        """Return 16 bytes that are equal for answers of equal content; the key of its embeddings."""
        content = json.dumps([self.text, self.token_ids, self.audio_frames]).encode()
        return hashlib.blake2b(content, digest_size=16).digest()


def ending_of(written: str | None) -> Ending | None:
    """Return the ending that a text names, None for any other text."""
    return next((ending for ending in get_args(Ending) if ending == written), None)
