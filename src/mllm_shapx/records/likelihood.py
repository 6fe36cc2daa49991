"""The likelihood of a given text after a coalition's prompt, and its file in the store."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

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


def likelihood_table(likelihoods: Mapping[LikelihoodKey, Likelihood], num_players: int) -> "pa.Table":
    """Return the table of a store's file; a coalition takes ceil(players / 8) bytes, little-endian."""
    import pyarrow as pa

    keys = sorted(likelihoods)
    rows = [likelihoods[key] for key in keys]
    width = max(1, (max(num_players, *(mask.bit_length() for _, mask in keys)) + 7) // 8)
    tops = [row.top_ids.reshape(-1) for row in rows], [row.top_logprobs.reshape(-1) for row in rows]
    return pa.table(
        {
            "forced": pa.array([forced for forced, _ in keys], pa.binary(16)),
            "mask": pa.array([mask.to_bytes(width, "little") for _, mask in keys], pa.binary(width)),
            "asked_by": pa.array([row.asked_by for row in rows], pa.string()),
            "logprobs": pa.array([row.logprobs for row in rows], pa.list_(pa.float32())),
            "top_k": pa.array([row.top_k for row in rows], pa.int32()),
            "top_ids": pa.array(tops[0], pa.list_(pa.int32())),
            "top_logprobs": pa.array(tops[1], pa.list_(pa.float32())),
        }
    )


def likelihoods_of(table: "pa.Table") -> Iterator[tuple[LikelihoodKey, Likelihood]]:
    """Yield the likelihoods of a table.

    Raises:
        ValueError: When a column is missing or invalid.
    """
    try:
        forced, masks, askers, top_ks = (
            table.column(name).to_pylist() for name in ("forced", "mask", "asked_by", "top_k")
        )
        columns = (_arrays(table, name) for name in ("logprobs", "top_ids", "top_logprobs"))
        rows = zip(forced, masks, askers, top_ks, *columns, strict=True)
        for what, mask, asked_by, top_k, logprobs, ids, tops in rows:
            shape = (len(logprobs), -1 if len(logprobs) else 0)
            found = Likelihood(logprobs, ids.reshape(shape), tops.reshape(shape), top_k, asked_by)
            yield (what, int.from_bytes(mask, "little")), found
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it holds no likelihoods ({error})") from error


def _arrays(table: "pa.Table", name: str) -> list[NDArray[np.generic]]:
    column = table.column(name).combine_chunks()
    values, ends = column.flatten().to_numpy(), column.value_lengths().to_numpy().cumsum()
    return np.split(values, ends[:-1]) if len(ends) else []
