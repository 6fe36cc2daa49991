"""The audio files of a sample: recordings that went in, and the answer as sound or codes."""

import io
import json

import numpy as np
import soundfile
from liquid_kit import chat, sound, spoken, wav, written
from mllm_shap import Role

from mllm_shapx.explaining.audio_records import answer_entry, audio_records
from mllm_shapx.models.base import Answer
from mllm_shapx.records.results import AudioPiece


def test_recordings_are_kept_as_wav() -> None:
    """Every spoken message is saved, FLAC as WAV, and described."""
    rng = np.random.default_rng(0)
    flac = io.BytesIO()
    soundfile.write(flac, sound(rng, 0.3), 16_000, format="FLAC")
    first = wav(sound(rng, 0.5))
    snapshot = chat(written("Be brief.", Role.SYSTEM), spoken(first), written("and"), spoken(flac.getvalue()))
    records = audio_records(355, snapshot, Answer("hm"), None)
    assert list(records.files) == ["audio/sample_00355/input_01.wav", "audio/sample_00355/input_03.wav"]
    assert records.files["audio/sample_00355/input_01.wav"] == first
    samples, rate = soundfile.read(io.BytesIO(records.files["audio/sample_00355/input_03.wav"]))
    assert (len(samples), rate) == (4800, 16_000)
    assert records.artifacts is not None
    assert [item["seconds"] for item in records.artifacts["inputs"]] == [0.5, 0.3]
    assert records.artifacts["answer"] is None
    assert answer_entry(records.artifacts) is None


def test_codes_are_kept_without_a_decoder() -> None:
    """A spoken answer of a checkpoint without a decoder is kept as codes, and the sample says so."""
    answer = Answer("hi", audio_frames=((1, 2), (3, 4), (5, 6)))
    records = audio_records(7, chat(written("hello")), answer, lambda _: None)
    content = records.files["audio/sample_00007/answer_codes.json"]
    assert json.loads(content) == {"codebooks": 2, "frames": [[1, 2], [3, 4], [5, 6]]}
    assert records.artifacts is not None
    assert "no audio decoder" in records.artifacts["answer"]["note"]
    entry = answer_entry(records.artifacts)
    assert entry is not None
    assert entry.content == (AudioPiece(len(content)),)


def test_a_decoded_answer_is_kept_as_wav() -> None:
    """With a decoder the answer is a WAV file at the decoder's rate."""
    answer = Answer("hi", audio_frames=((1, 2),))
    records = audio_records(7, chat(written("hello")), answer, lambda _: (np.zeros(2400, np.float32), 24_000))
    samples, rate = soundfile.read(io.BytesIO(records.files["audio/sample_00007/answer.wav"]))
    assert (len(samples), rate) == (2400, 24_000)


def test_a_written_row_keeps_nothing() -> None:
    """Without any audio there are no files and no artifacts."""
    records = audio_records(7, chat(written("hello")), Answer("hi"), None)
    assert not records.files
    assert records.artifacts is None
