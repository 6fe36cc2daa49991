"""Encodes answers as Parquet bytes and back, with a header and a checksum over the whole file."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self, get_args

from mllm_shapx.records.answer import Answer, Ending
from mllm_shapx.records.likelihood import Likelihood, LikelihoodKey

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

SCHEMA_VERSION = 1

_COLUMNS = ("mask", "text", "token_ids", "logprobs", "audio_frames", "asked_by")
"""Columns of every file of answers; those of servers' answers are there where they hold something."""
_HEADER = b"mllm_shapx"
_CHECKSUM = "mllm_shapx_checksum"
_SEAL = b"mllm_shapx_checksum_is:"
_BLANK = b"0" * 32


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """The settings, conversation and players of a store file's answers."""

    settings: Mapping[str, Any]
    """Everything that decides an answer: generation settings, model commit, dtype (JSON data)."""
    snapshot_id: str = ""
    """mllm_shap's id of the whole conversation; empty if the writer or reader does not know it."""
    num_players: int = 0
    """Players of the row; 0 if unknown."""

    def completed(self, snapshot_id: str, num_players: int) -> Self:
        """Return the header with these in place of what it does not know."""
        return replace(
            self, snapshot_id=self.snapshot_id or snapshot_id, num_players=self.num_players or num_players
        )

    def conflict(self, other: "StoreHeader") -> str | None:
        """Return the contradiction of two headers in words, None when there is none."""
        if _canonical(dict(self.settings)) != _canonical(other.settings):
            return "it was made with other generation settings"
        if self.snapshot_id and other.snapshot_id and self.snapshot_id != other.snapshot_id:
            return "it belongs to another conversation"
        if self.num_players and other.num_players and self.num_players != other.num_players:
            return f"it has {other.num_players} players, not {self.num_players}"
        return None


def encode_answers(header: StoreHeader, answers: Mapping[int, Answer]) -> bytes:
    """Return a file of answers, ordered by coalition."""
    import pyarrow as pa

    masks = sorted(answers)
    rows = [answers[mask] for mask in masks]
    columns = {
        "mask": _masks(masks, header.num_players),
        "text": pa.array([_encodable(row.text) for row in rows], pa.string()),
        "token_ids": pa.array([row.token_ids for row in rows], pa.list_(pa.int32())),
        "logprobs": pa.array([row.logprobs for row in rows], pa.list_(pa.float64())),
        "audio_frames": pa.array([row.audio_frames for row in rows], pa.list_(pa.list_(pa.int32()))),
        "asked_by": pa.array([row.asked_by for row in rows], pa.string()),
    }
    of_servers = {
        "ending": pa.array([row.ending for row in rows], pa.string()),
        "reasoning": pa.array([_encodable(row.reasoning) or None for row in rows], pa.string()),
        "tokens_in": pa.array([row.tokens_in for row in rows], pa.int64()),
        "tokens_out": pa.array([row.tokens_out for row in rows], pa.int64()),
    }
    columns |= {name: column for name, column in of_servers.items() if column.null_count < len(column)}
    return _encode_table(pa.table(columns), header)


def decode_answers(table: "pa.Table") -> Iterator[tuple[int, Answer]]:
    """Yield the coalitions and answers of a table.

    Raises:
        ValueError: When a column is missing.
    """
    columns = (_column(table, name).to_pylist() for name in _COLUMNS)
    of_servers = (
        _column(table, name).to_pylist() if name in table.column_names else [None] * table.num_rows
        for name in ("ending", "reasoning", "tokens_in", "tokens_out")
    )
    for mask, text, token_ids, logprobs, frames, asker, ending, reasoning, tokens_in, tokens_out in zip(
        *columns, *of_servers, strict=True
    ):
        answer = Answer(
            text,
            tuple(token_ids or ()),
            None if logprobs is None else tuple(logprobs),
            tuple(map(tuple, frames or ())),
            ending if ending in get_args(Ending) else None,
            reasoning or "",
            tokens_in,
            tokens_out,
            asker,
        )
        yield int.from_bytes(mask, "little"), answer


def decode_texts(data: bytes, masks: Collection[int]) -> tuple[dict[int, str], StoreHeader]:
    """Return the texts of some coalitions' answers and the header, without decoding the others.

    Raises:
        ValueError: As `decode_table`, or when a column is missing.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table, header = decode_table(data, ("mask", "text"))
    column, texts = _column(table, "mask"), _column(table, "text")
    width = column.type.byte_width
    found = {}
    for mask in masks:
        if mask.bit_length() <= 8 * width:
            place = pc.index(column, pa.scalar(mask.to_bytes(width, "little"), column.type)).as_py()
            if place >= 0:
                found[mask] = texts[place].as_py()
    return found, header


def encode_embeddings(
    header: StoreHeader, vectors: "Mapping[tuple[str, bytes], NDArray[np.float64]]"
) -> bytes:
    """Return a file of vectors, keyed by kind and `content_id` of the answer."""
    import pyarrow as pa

    keys = sorted(vectors)
    table = pa.table(
        {
            "kind": pa.array([kind for kind, _ in keys], pa.string()),
            "answer": pa.array([answer for _, answer in keys], pa.binary(16)),
            "vector": pa.array([vectors[key] for key in keys], pa.list_(pa.float64())),
        }
    )
    return _encode_table(table, header)


def decode_embeddings(table: "pa.Table") -> "Iterator[tuple[tuple[str, bytes], NDArray[np.float64]]]":
    """Yield kind, answer and vector of a table.

    Raises:
        ValueError: When a column is missing.
    """
    kinds, answers = _column(table, "kind").to_pylist(), _column(table, "answer").to_pylist()
    for kind, answer, vector in zip(kinds, answers, _column(table, "vector"), strict=True):
        yield (kind, answer), vector.values.to_numpy()


def encode_likelihoods(header: StoreHeader, likelihoods: Mapping[LikelihoodKey, Likelihood]) -> bytes:
    """Return a file of likelihoods, keyed by continuation and coalition."""
    import pyarrow as pa

    keys = sorted(likelihoods)
    rows = [likelihoods[key] for key in keys]
    columns = {
        "forced": pa.array([forced for forced, _ in keys], pa.binary(16)),
        "mask": _masks([mask for _, mask in keys], header.num_players),
        "asked_by": pa.array([row.asked_by for row in rows], pa.string()),
        "logprobs": pa.array([row.logprobs for row in rows], pa.list_(pa.float32())),
        "top_k": pa.array([row.top_k for row in rows], pa.int32()),
        "top_ids": pa.array([row.top_ids.reshape(-1) for row in rows], pa.list_(pa.int32())),
        "top_logprobs": pa.array([row.top_logprobs.reshape(-1) for row in rows], pa.list_(pa.float32())),
    }
    return _encode_table(pa.table(columns), header)


def decode_likelihoods(table: "pa.Table") -> Iterator[tuple[LikelihoodKey, Likelihood]]:
    """Yield the likelihoods of a table.

    Raises:
        ValueError: When a column is missing or invalid.
    """
    forced, masks, askers, top_ks = (
        _column(table, name).to_pylist() for name in ("forced", "mask", "asked_by", "top_k")
    )
    try:
        columns = (_numbers(_column(table, name)) for name in ("logprobs", "top_ids", "top_logprobs"))
        rows = zip(forced, masks, askers, top_ks, *columns, strict=True)
        for what, mask, asked_by, top_k, logprobs, ids, tops in rows:
            shape = (len(logprobs), -1 if len(logprobs) else 0)
            found = Likelihood(logprobs, ids.reshape(shape), tops.reshape(shape), top_k, asked_by)
            yield (what, int.from_bytes(mask, "little")), found
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it holds no likelihoods ({error})") from error


def decode_table(data: bytes, columns: Sequence[str] | None = None) -> "tuple[pa.Table, StoreHeader]":
    """Return a file's table, or some of its columns, and its header.

    Raises:
        ValueError: When the file is damaged or of another schema version; the message has the reason.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_bytes(data)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(columns=columns, use_threads=columns is None)
        fields = json.loads(file.metadata.metadata[_HEADER])
        version = fields["schema_version"]
        header = StoreHeader(fields["settings"], fields["snapshot_id"], fields["num_players"])
    # Parquet's reader raises OSError for invalid bytes, though no file is involved.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"it is no file of the store ({type(error).__name__}: {error})") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {version!r}, not {SCHEMA_VERSION}")
    return table, header


def _encode_table(table: "pa.Table", header: StoreHeader) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {"schema_version": SCHEMA_VERSION, **asdict(header)}
    metadata = {_HEADER: _canonical(fields), _CHECKSUM: (_SEAL + _BLANK).decode()}
    sink = pa.BufferOutputStream()
    # Without the Arrow schema: it would hold a second copy of the metadata.
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", write_statistics=False, store_schema=False
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)
    return _sealed(bytes(sink.getvalue().to_pybytes()))


def _sealed(data: bytes) -> bytes:
    """Return the file with the checksum of all other bytes in place of the blank."""
    at = data.rindex(_SEAL) + len(_SEAL)
    return data[:at] + _digest(data) + data[at + len(_BLANK) :]


def check_bytes(data: bytes) -> None:
    """Verify the checksum before Parquet's reader sees the bytes.

    Raises:
        ValueError: When the bytes have changed since writing.
    """
    if not data:
        raise ValueError("it is empty")
    at = data.rfind(_SEAL) + len(_SEAL)
    found = data[at : at + len(_BLANK)]
    blank = data[:at] + _BLANK + data[at + len(_BLANK) :]
    if at < len(_SEAL) or found != _digest(blank):
        raise ValueError("it is damaged (its content does not match its checksum)")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=len(_BLANK) // 2).hexdigest().encode()


def _masks(masks: Sequence[int], num_players: int) -> "pa.Array":
    """Return coalitions as ceil(players / 8) bytes each, little-endian: bit i of the whole is player i."""
    import pyarrow as pa

    width = max(1, (max(num_players, *(mask.bit_length() for mask in masks), 0) + 7) // 8)
    return pa.array([mask.to_bytes(width, "little") for mask in masks], pa.binary(width))


def _encodable(text: str) -> str:
    """Return a text without lone surrogates, which UTF-8 lacks."""
    return text.encode(errors="replace").decode()


def _column(table: "pa.Table", name: str) -> "pa.Array":
    if name not in table.column_names:
        raise ValueError(f"it has no column {name!r}")
    return table.column(name).combine_chunks()


def _numbers(array: "pa.Array") -> "list[NDArray[Any]]":
    """Return lists of numbers as arrays, without nulls."""
    import numpy as np

    values, ends = array.flatten().to_numpy(), array.value_lengths().to_numpy().cumsum()
    return np.split(values, ends[:-1]) if len(ends) else []


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
