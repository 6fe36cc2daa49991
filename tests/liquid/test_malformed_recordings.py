"""Twenty recordings that are unusual or broken: each is explained or refused in words."""

import io
import struct

import numpy as np
import pytest
import soundfile
from liquid_kit import chat, model, sound, spoken, wav

from mllm_shapx.config.models import AudioSegmentation
from mllm_shapx.data.audio import check_recording
from mllm_shapx.errors import RowError
from mllm_shapx.explaining.audio_players import audio_player_set
from mllm_shapx.models.base import Decoding
from mllm_shapx.planning.players import PlayerRule

RNG = np.random.default_rng(0)
TONE = sound(RNG, 0.4)
GOOD = wav(TONE)


def _encoded(samples: np.ndarray, rate: int, **options: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def _float_wav(samples: np.ndarray) -> bytes:
    return _encoded(samples.astype(np.float32), 16_000, format="WAV", subtype="FLOAT")


EXPLAINED = {
    "rate 192 kHz": _encoded(sound(RNG, 0.2, 192_000), 192_000, format="WAV"),
    "rate 8 kHz": _encoded(sound(RNG, 0.4, 8_000), 8_000, format="WAV"),
    "rate 11025 Hz, odd for a resampler": _encoded(sound(RNG, 0.4, 11_025), 11_025, format="WAV"),
    "8-bit": _encoded(TONE, 16_000, format="WAV", subtype="PCM_U8"),
    "24-bit": _encoded(TONE, 16_000, format="WAV", subtype="PCM_24"),
    "6 channels": _encoded(np.stack([TONE] * 6, axis=1), 16_000, format="WAV"),
    "stereo FLAC": _encoded(np.stack([TONE] * 2, axis=1), 16_000, format="FLAC"),
    "MP3": _encoded(TONE, 16_000, format="MP3"),
    "one sample": wav([0.5]),
    "louder than full scale": _float_wav(3 * TONE),
    "mu-law": _encoded(TONE, 16_000, format="WAV", subtype="ULAW"),
}
REFUSED = {
    "no bytes": b"",
    "no samples": wav([]),
    "text instead of audio": b"this is not a recording",
    "header only": GOOD[:12],
    "header of another format": b"fLaC" + GOOD[4:],
    "format block cut": GOOD[:20],
    "sample rate 0": GOOD[:24] + struct.pack("<I", 0) + GOOD[28:],
    "NaN": _float_wav(np.where(np.arange(len(TONE)) == 7, np.nan, TONE)),
    "infinite": _float_wav(np.where(np.arange(len(TONE)) == 7, np.inf, TONE)),
    "silence": wav(np.zeros(3200)),
    "MP3 cut in its first frame": _encoded(TONE, 16_000, format="MP3")[:30],
}
CUT = {
    "data cut in the middle": GOOD[: len(GOOD) // 2],
    "FLAC cut": _encoded(TONE, 16_000, format="FLAC")[:-900],
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_unusual_recordings_are_explained(name: str) -> None:
    """Rates, widths, channels and formats of all kinds give players and an answer."""
    data = EXPLAINED[name]
    snapshot = chat(spoken(data, check_recording(data)))
    players = audio_player_set(snapshot, AudioSegmentation(), PlayerRule("none"))
    assert players.num_players >= 1
    decoding = Decoding(max_new_tokens=2, logprobs=True)
    (answer,) = model().answer([model().encode(snapshot, decoding)], decoding, [0])
    assert np.isfinite(answer.logprobs or ()).all()


@pytest.mark.parametrize("name", REFUSED)
def test_broken_recordings_are_refused_in_words(name: str) -> None:
    """What cannot be heard is a RowError with a reason and a sentence, never another exception."""
    with pytest.raises(RowError) as raised:
        check_recording(REFUSED[name])
    assert raised.value.reason in {"bad_audio", "empty_audio", "silent_audio"}
    assert len(str(raised.value)) > 20


@pytest.mark.parametrize("name", CUT)
def test_cut_recordings_are_explained_or_refused(name: str) -> None:
    """A recording cut off in its data is heard as far as it goes, or refused; nothing else may happen."""
    try:
        rate = check_recording(CUT[name])
    except RowError:
        return
    assert (
        audio_player_set(chat(spoken(CUT[name], rate)), AudioSegmentation(), PlayerRule("none")).num_players
        >= 1
    )
