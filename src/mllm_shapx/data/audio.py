"""Recordings: encoded bytes to a mono waveform and back, with what is wrong said in words."""

import io
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.errors import RowError, UsageError

SILENCE = 1e-5
"""Peak amplitude, of full scale 1, under which a recording says nothing: less than a bit of 16-bit audio."""


def decode(data: bytes, *, allow_empty: bool = False) -> tuple[NDArray[np.float32], int]:
    """Decode WAV, FLAC, MP3 or any other format of libsndfile.

    Returns:
        The waveform, shape (samples,), float32, channels averaged, and its sample rate in hertz.

    Raises:
        RowError: `empty_audio` for no bytes, or no samples unless `allow_empty`; `bad_audio` for bytes that
            are no audio, or samples that are not finite.
        UsageError: When soundfile is not installed.
    """
    if not data:
        raise RowError("empty_audio", "the recording holds no bytes")
    soundfile = _soundfile()
    try:
        frames, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RowError("bad_audio", f"the recording cannot be decoded ({_reason(error)})") from error
    if len(frames) == 0 and not allow_empty:
        raise RowError("empty_audio", "the recording is 0 samples long")
    if not np.isfinite(frames).all():
        raise RowError("bad_audio", "the recording holds samples that are not numbers (NaN or infinite)")
    waveform: NDArray[np.float32] = frames.mean(axis=1, dtype=np.float32)
    return waveform, int(rate)


def encode_wav(waveform: NDArray[np.floating], rate: int) -> bytes:
    """Encode a mono waveform, shape (samples,), full scale 1, as 16-bit WAV; louder samples are clipped."""
    buffer = io.BytesIO()
    samples = np.clip(np.asarray(waveform, dtype=np.float32), -1.0, 1.0)
    _soundfile().write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def check_recording(data: bytes) -> int:
    """Return the sample rate in hertz of a recording that can be explained.

    Raises:
        RowError: As `decode`, and `silent_audio` when no sample reaches `SILENCE`.
    """
    waveform, rate = decode(data)
    if float(np.abs(waveform).max()) < SILENCE:
        raise RowError("silent_audio", f"the recording is silent for all its {len(waveform) / rate:.2f} s")
    return rate


def _reason(error: Exception) -> str:
    words = str(error)
    if words.startswith("Error opening"):
        return "it is no WAV, FLAC, MP3 or OGG file, or its header is damaged"
    return " ".join(words.split()) or type(error).__name__


def _soundfile() -> ModuleType:
    try:
        import soundfile
    except ImportError as error:
        raise UsageError(
            "recordings need the package soundfile; install the audio extra: pip install 'mllm-shapx[audio]'"
        ) from error
    module: ModuleType = soundfile
    return module
