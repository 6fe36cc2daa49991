"""Builds the audio files of a sample: the prompt's recordings, and the answer's waveform or codes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mllm_shap import AudioPart, ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.data.audio import decode, encode_wav
from mllm_shapx.models.base import Answer
from mllm_shapx.records.results import ASSISTANT, AUDIO, AudioPiece, ConversationEntry

DecodeAudio = Callable[[Answer], tuple[NDArray[np.float32], int] | None]
"""Answer -> (mono samples in [-1, 1], hertz); None when the checkpoint has no decoder."""

NO_DECODER = (
    "the checkpoint has no audio decoder, so the answer's codes were kept instead of a waveform; "
    "any decoder of the same codec turns them into sound"
)


@dataclass(frozen=True, slots=True)
class AudioRecords:
    """The audio files of one sample."""

    files: Mapping[str, bytes]
    """Path below the run's directory -> content."""
    artifacts: dict[str, Any] | None
    """The sample's `audio_artifacts`: JSON data that names the files; None without audio."""


def audio_records(
    row_index: int, snapshot: ConversationSnapshot, answer: Answer, decode_audio: DecodeAudio | None
) -> AudioRecords:
    """Return the recordings of the whole prompt and the audio of its answer.

    Files are below `audio/sample_ROW/`: `input_MESSAGE.wav` (MESSAGE: position in the conversation, the
    system prompt included, from 0), and `answer.wav`, or `answer_codes.json` without a decoder.

    Args:
        row_index: The row, for the folder's name.
        snapshot: The whole conversation.
        answer: The model's answer to it.
        decode_audio: Decodes frames; None for a model without audio output.
    """
    folder = f"audio/sample_{row_index:05d}"
    files: dict[str, bytes] = {}
    inputs: list[dict[str, Any]] = []
    for index, message in enumerate(snapshot.messages()):
        for part in message.content:
            if isinstance(part, AudioPart):
                path = f"{folder}/input_{index:02d}.wav"
                files[path], described = _input(part)
                inputs.append({"path": path, "message_index": index, **described})
    spoken = _answer(folder, answer, decode_audio, files)
    if not inputs and spoken is None:
        return AudioRecords({}, None)
    return AudioRecords(files, {"inputs": inputs, "answer": spoken})


def _input(part: AudioPart) -> tuple[bytes, dict[str, Any]]:
    """Return a recording as WAV, and its sample rate and size."""
    data = part.data()
    waveform, rate = decode(data)
    wav = data if data[:4] == b"RIFF" else encode_wav(waveform, rate)
    return wav, {"sample_rate": rate, "seconds": len(waveform) / rate, "num_bytes": len(wav)}


def _answer(
    folder: str, answer: Answer, decode_audio: DecodeAudio | None, files: dict[str, bytes]
) -> dict[str, Any] | None:
    if not answer.audio_frames:
        return None
    about: dict[str, Any] = {
        "num_frames": len(answer.audio_frames),
        "codebooks": len(answer.audio_frames[0]),
    }
    sound = None if decode_audio is None else decode_audio(answer)
    if sound is None:
        path = f"{folder}/answer_codes.json"
        codes = {"codebooks": about["codebooks"], "frames": answer.audio_frames}
        files[path] = (json.dumps(codes) + "\n").encode()
        return {"path": path, **about, "num_bytes": len(files[path]), "note": NO_DECODER}
    samples, rate = sound
    path = f"{folder}/answer.wav"
    files[path] = encode_wav(np.nan_to_num(samples), rate)
    seconds = len(samples) / rate
    return {"path": path, **about, "num_bytes": len(files[path]), "sample_rate": rate, "seconds": seconds}


def answer_entry(artifacts: dict[str, Any] | None) -> ConversationEntry | None:
    """Return the spoken answer as an entry of the conversation's last turn; None for a text answer."""
    answer = None if artifacts is None else artifacts["answer"]
    return (
        None
        if answer is None
        else ConversationEntry(AUDIO, (ASSISTANT,), (AudioPiece(answer["num_bytes"]),), None)
    )
