"""Reads a dataset row as the conversation to explain."""

import contextlib
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_shapx.config.models import ChatConfig, DatasetConfig, ModalityConfig
from mllm_shapx.config.paths import expanded
from mllm_shapx.data.columns import resolve_columns
from mllm_shapx.data.table import Table
from mllm_shapx.errors import RowError

if TYPE_CHECKING:
    from mllm_shap import ConversationSnapshot, Message

UNKNOWN = "unknown"
"""Language of a row without a language."""

_LONGEST_NAN = 16
"""Longest text, in characters, that is tested for the word nan and blanks."""

_MOST_BYTES = 1 << 28
"""Largest recording's file that is read, in bytes; larger files exceed the longest accepted recording."""


@dataclass(frozen=True, slots=True)
class Row:
    """The user's messages of one row: one piece, written or spoken, per message."""

    row_index: int
    texts: tuple[str, ...]
    """Text of each piece; a spoken piece's transcript, empty when unknown."""
    recordings: tuple[bytes | None, ...]
    """Encoded audio of each spoken piece; None for a written one."""
    sample_rates: tuple[int | None, ...]
    """Hertz of each recording."""
    language: str
    original_language: str


def sentences(value: Any) -> list[str]:
    """Return the texts of a text column's value, one per user message; blank ones are left out."""
    return [text for text in _texts(value) if text.strip()]


def load_row(table: Table, row_index: int, dataset: DatasetConfig, modality: ModalityConfig) -> Row:
    """Read one row and check its recordings.

    Raises:
        RowError: `no_text`, `bad_text`, `no_audio`, `bad_audio`, `empty_audio`, `silent_audio`,
            `long_audio`, `audio_text_mismatch` or `unreadable_row`, for faults of this row.
        DatasetError: When a column is missing.
    """
    values = table.row(row_index, resolve_columns(table, dataset, modality).names)
    try:
        said, (language, original_language) = read_content(values, table, dataset, modality)
        rates = _sample_rates([data for _, data in said])
    except RowError as error:
        raise RowError(error.reason, f"row {row_index}: {error}") from error
    return Row(
        row_index=row_index,
        texts=tuple(text for text, _ in said),
        recordings=tuple(data for _, data in said),
        sample_rates=rates,
        language=language,
        original_language=original_language,
    )


def read_content(
    values: Mapping[str, Any], table: Table, dataset: DatasetConfig, modality: ModalityConfig
) -> tuple[list[tuple[str, bytes | None]], tuple[str, str]]:
    """Return a row's pieces and its two languages; recordings are read but not decoded.

    Args:
        values: The row's values of the columns from `resolve_columns`.
        table: The row's dataset.
        dataset: Column names.
        modality: Which pieces are written and which are spoken.

    Raises:
        RowError: As `load_row`, except errors of decoding.
    """
    columns = resolve_columns(table, dataset, modality)
    text = None if columns.text is None else values[columns.text]
    recorded = None if columns.audio is None else values[columns.audio]
    pieces = _pieces(text, recorded, modality) if columns.audio else _written(text)
    languages = _language(values, columns.language), _language(values, columns.original_language)
    return _said(pieces, modality, table), languages


def to_snapshot(row: Row, chat: ChatConfig, *, with_transcripts: bool = False) -> "ConversationSnapshot":
    """Return the system prompt, unless empty, and one turn per piece.

    Each piece is a separate message, because masking edits only the first recording of a message.
    `with_transcripts` puts the text of a spoken piece beside its recording, for a partition that aligns them.
    """
    from mllm_shap import ConversationSnapshot, Message, Role, Turn

    messages = [Message(role=Role.SYSTEM, text=chat.system_prompt)] if chat.system_prompt.strip() else []
    messages += [_message(row, number, with_transcripts) for number in range(len(row.texts))]
    return ConversationSnapshot.from_turns(tuple(Turn(messages=(message,)) for message in messages))


def _message(row: Row, number: int, with_transcripts: bool) -> "Message":
    from mllm_shap import AudioPart, Message, Role, TextPart

    text, recording, rate = row.texts[number], row.recordings[number], row.sample_rates[number]
    if recording is None or rate is None:
        return Message(role=Role.USER, text=text)
    audio = AudioPart(recording, rate)
    if with_transcripts and text.strip():
        return Message(role=Role.USER, content=(TextPart(text), audio))
    return Message(role=Role.USER, content=(audio,))


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict | list | bytes) for item in items):
        raise RowError("bad_text", "the text column holds neither text nor a list of texts")
    return ["" if is_missing(item) else str(item) for item in items]


def is_missing(value: Any) -> bool:
    """Return whether a value means a missing text: null, NaN, or the word nan, which tools write for it."""
    if isinstance(value, str):
        return len(value) < _LONGEST_NAN and value.strip() in {"nan", "NaN"}
    return value is None or (isinstance(value, float) and math.isnan(value))


def _written(text: Any) -> list[tuple[str, None]]:
    pieces = [(sentence, None) for sentence in sentences(text)]
    if not pieces:
        raise RowError("no_text", "there is no text: the value is empty or NaN")
    return pieces


def _pieces(text: Any, recordings: Any, modality: ModalityConfig) -> list[tuple[str, Any]]:
    """Pair sentences and recordings; a blank sentence is dropped with its recording."""
    spoken = recordings if isinstance(recordings, list) else [recordings]
    written = _texts(text)
    if any(sentence.strip() for sentence in written):
        if len(written) != len(spoken):
            raise RowError(
                "audio_text_mismatch",
                f"there are {len(written)} sentence(s) but {len(spoken)} recording(s)",
            )
        return [pair for pair in zip(written, spoken, strict=True) if pair[0].strip()]
    if not modality.input_modality.startswith("audio__"):
        raise RowError("no_text", "there is no text")
    found = [("", recording) for recording in spoken if recording is not None]
    if not found:
        raise RowError("no_audio", "there is no recording")
    return found


def _said(
    pieces: Sequence[tuple[str, Any]], modality: ModalityConfig, table: Table
) -> list[tuple[str, bytes | None]]:
    """Return text and recording of each piece; the modality tells which are spoken."""
    said: list[tuple[str, bytes | None]] = []
    for number, (text, recording) in enumerate(pieces):
        with _of_recording(number, len(pieces)):
            is_spoken = _is_spoken(number, modality)
            said.append((text, _bytes(recording, table.folder) if is_spoken else None))
    return said


def _sample_rates(recordings: Sequence[bytes | None]) -> tuple[int | None, ...]:
    """Check each recording; return its sample rate."""
    if not any(data is not None for data in recordings):
        return (None,) * len(recordings)
    from mllm_shapx.data.audio import check_recording

    rates: list[int | None] = []
    for number, data in enumerate(recordings):
        with _of_recording(number, len(recordings)):
            rates.append(None if data is None else check_recording(data))
    return tuple(rates)


@contextlib.contextmanager
def _of_recording(number: int, count: int) -> Iterator[None]:
    """Add the number of the piece to an error when there are several."""
    try:
        yield
    except RowError as error:
        of = f"recording {number + 1} of {count}: " if count > 1 else ""
        raise RowError(error.reason, f"{of}{error}") from error


def _is_spoken(number: int, modality: ModalityConfig) -> bool:
    """Return whether piece `number`, from 0, is a recording (docs/formats.md, `input_modality`)."""
    written = modality.input_modality
    if written.startswith("interleaved__text_first"):
        return number % 2 == 1
    if written.startswith("interleaved__audio_first"):
        return number % 2 == 0
    return modality.has_audio_input


def _bytes(recording: Any, folder: Path | None) -> bytes:
    """Return the encoded bytes of a recording stored as bytes, as a path or as a `datasets` Audio feature."""
    if isinstance(recording, bytes):
        return recording
    if isinstance(recording, str):
        return _read_file(recording, folder)
    if isinstance(recording, dict):
        if isinstance(recording.get("bytes"), bytes):
            return bytes(recording["bytes"])
        if isinstance(recording.get("path"), str) and recording["path"]:
            return _read_file(recording["path"], folder)
        if recording.get("array") is not None and recording.get("sampling_rate"):
            return _from_samples(recording)
    if recording is None or isinstance(recording, dict):
        raise RowError("no_audio", "the recording is missing")
    raise RowError(
        "bad_audio", f"the audio column holds {type(recording).__name__}, not a recording or a path"
    )


def _read_file(written: str, folder: Path | None) -> bytes:
    try:
        path = expanded(written)
    except ValueError as error:
        raise RowError("no_audio", f"the recording's path {error}") from error
    path = path if folder is None else folder / path
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise RowError("bad_audio", f"{path} is no file")
        if found.st_size > _MOST_BYTES:
            raise RowError("long_audio", f"{path} is larger than {_MOST_BYTES >> 20} MB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise RowError("no_audio", f"there is no file {path}") from error
    except OSError as error:
        raise RowError("no_audio", f"{path} cannot be read ({error.strerror})") from error


def _from_samples(recording: Mapping[str, Any]) -> bytes:
    import numpy as np

    from mllm_shapx.data.audio import MOST_RATE, encode_wav

    try:
        samples = np.asarray(recording["array"], dtype=np.float32)
        rate = int(recording["sampling_rate"])
    except (TypeError, ValueError, OverflowError):
        samples, rate = np.zeros((1, 1), dtype=np.float32), 0
    if samples.ndim != 1 or not np.isfinite(samples).all() or not 0 < rate <= MOST_RATE:
        raise RowError("bad_audio", "the recording's samples are not one row of numbers with a sampling rate")
    return encode_wav(samples, rate)


def _language(values: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else values[column]
    return UNKNOWN if value is None or not str(value).strip() else str(value)
