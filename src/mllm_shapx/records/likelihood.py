"""The likelihood of a given text after a coalition's prompt."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Forced = str | tuple[int, ...]
"""The forced continuation of a prompt: a text, which is tokenized by itself, or token ids."""

LikelihoodKey = tuple[bytes, int]
"""(`forced_id` of the continuation, coalition): bit i is set when player i is present."""


@dataclass(frozen=True, slots=True, eq=False)
class Likelihood:
    """The probabilities of given tokens after a prompt, without generation."""

    logprobs: NDArray[np.float32]
    """Natural-log probability of each token, (tokens,)."""
    top_ids: NDArray[np.int32]
    """The most probable tokens at each position, (tokens, k): k is `top_k`, at most the vocabulary size."""
    top_logprobs: NDArray[np.float32]
    """Their log-probabilities, in descending order, (tokens, k)."""
    top_k: int = 0
    """Requested number of most probable tokens."""
    asked_by: str = ""
    """Name of the run for which it was computed."""

    @classmethod
    def of_nothing(cls, top_k: int, asked_by: str = "") -> "Likelihood":
        """Return the likelihood of an empty continuation."""
        return cls(
            np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), top_k, asked_by
        )


def forced_id(forced: Forced) -> bytes:
    """Return 16 bytes, equal for equal continuations."""
    return hashlib.blake2b(json.dumps(forced).encode(), digest_size=16).digest()
