"""Recordings: decoding what can be decoded, and words for what cannot."""

import io
from typing import Any

import numpy as np
import pytest
import soundfile
from data_kit import tone, wav
from numpy.typing import NDArray

from mllm_shapx.data.audio import check_recording, decode, encode_wav
from mllm_shapx.errors import RowError


def _encoded(samples: NDArray[Any], rate: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def _reason(data: bytes) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        check_recording(data)
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(wav(tone()), id="wav-16-bit"),
        pytest.param(wav(tone(), width=1), id="wav-8-bit"),
        pytest.param(_encoded(tone(), 16_000, "WAV", "FLOAT"), id="wav-float"),
        pytest.param(_encoded(tone(), 16_000, "WAV", "PCM_24"), id="wav-24-bit"),
        pytest.param(_encoded(tone(), 16_000, "WAV", "ULAW"), id="wav-mu-law"),
        pytest.param(_encoded(tone(), 16_000, "FLAC"), id="flac"),
        pytest.param(_encoded(tone(), 16_000, "OGG"), id="ogg-vorbis"),
    ],
)
def test_encodings_give_the_waveform(data: bytes) -> None:
    """WAV of every sample type, FLAC and OGG decode to the mono float32 waveform at its own rate."""
    waveform, rate = decode(data)
    assert rate == 16_000
    assert waveform.dtype == np.float32
    assert waveform.shape == (1600,)
    assert np.corrcoef(waveform, tone())[0, 1] > 0.99


def test_mp3_is_decoded() -> None:
    """MP3 decodes at its own rate, to about its length."""
    waveform, rate = decode(_encoded(tone(0.5, 22_050), 22_050, "MP3"))
    assert rate == 22_050
    assert abs(len(waveform) - 11_025) < 3000
    assert np.abs(waveform).max() > 0.4


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(channels: int) -> None:
    """Any number of channels becomes one: their mean."""
    parts = np.stack([tone() * (number + 1) / channels for number in range(channels)], axis=1)
    waveform, _ = decode(wav(parts))
    assert waveform == pytest.approx(parts.mean(axis=1), abs=1e-3)


@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
def test_any_rate_is_kept(rate: int) -> None:
    """The rate is told, not changed."""
    assert decode(wav(tone(rate=rate), rate))[1] == rate
    assert check_recording(wav(tone(rate=rate), rate)) == rate


def test_encoding_round_trips() -> None:
    """encode_wav keeps length, rate and samples to 16 bits, and clips what is too loud."""
    waveform, rate = decode(encode_wav(tone(), 24_000))
    assert rate == 24_000
    assert waveform == pytest.approx(tone(), abs=1e-4)
    assert np.abs(decode(encode_wav(tone() * 9, 16_000))[0]).max() <= 1.0


def test_an_empty_waveform_is_allowed_where_asked() -> None:
    """A recording whose every stretch was cut out decodes to no samples when the caller expects that."""
    waveform, rate = decode(encode_wav(np.zeros(0, np.float32), 16_000), allow_empty=True)
    assert waveform.shape == (0,)
    assert rate == 16_000


def test_silence_is_refused_for_a_row_and_decoded_otherwise() -> None:
    """A silent recording explains nothing; silenced audio of an absent player still decodes."""
    silent = wav(np.zeros(8000, np.float32))
    reason, words = _reason(silent)
    assert reason == "silent_audio"
    assert "0.50 s" in words
    assert not decode(silent)[0].any()


_WAV = wav(tone())
_FLAC = _encoded(tone(), 16_000, "FLAC")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty_audio", id="no-bytes"),
        pytest.param(wav(np.zeros(0, np.float32)), "empty_audio", id="no-samples"),
        pytest.param(b"RIFF", "bad_audio", id="header-cut"),
        pytest.param(_WAV[:30], "bad_audio", id="wav-header-cut"),
        pytest.param(b"\0" * 5000, "bad_audio", id="zero-bytes"),
        pytest.param(b"no audio at all" * 100, "bad_audio", id="text"),
        pytest.param(b"OggS" + _WAV[4:], "bad_audio", id="wrong-magic"),
        pytest.param(_WAV[:12] + b"\xff" * 32 + _WAV[44:], "bad_audio", id="wrong-chunks"),
        pytest.param(_FLAC[:60], "bad_audio", id="flac-header-cut"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "bad_audio", id="png"),
        pytest.param(
            _encoded(np.array([0.1, np.nan, 0.2] * 100, np.float32), 16_000, "WAV", "FLOAT"),
            "bad_audio",
            id="nan",
        ),
        pytest.param(
            _encoded(np.array([0.1, np.inf] * 100, np.float32), 16_000, "WAV", "FLOAT"), "bad_audio", id="inf"
        ),
    ],
)
def test_what_cannot_be_explained_is_said_in_words(data: bytes, reason: str) -> None:
    """Each kind of broken recording fails its row with a stable reason and no library's traceback."""
    found, words = _reason(data)
    assert found == reason
    assert "the recording" in words
    assert "BytesIO" not in words


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("data", [pytest.param(_WAV, id="wav"), pytest.param(_FLAC, id="flac")])
def test_a_recording_cut_short_is_read_or_refused(data: bytes, keep: float) -> None:
    """Truncation gives the samples that are left or a failure in words, never a crash."""
    cut = data[: int(len(data) * keep)]
    length, reason = 1, ""
    try:
        length = len(decode(cut)[0])
    except RowError as error:
        reason = error.reason
    assert 0 < length <= 1600
    assert reason in {"", "bad_audio", "empty_audio"}
