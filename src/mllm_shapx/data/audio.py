"""Decodes recordings to mono waveforms, and encodes waveforms as WAV."""

import io
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.errors import RowError, UsageError

MOST_SECONDS = 600
"""Longest accepted recording: ten minutes, 7,500 windows of 80 ms."""

MOST_RATE = 192_000
"""Highest accepted sample rate, in hertz."""

MOST_CHANNELS = 64

_BLOCK = 1 << 16
"""Frames decoded at a time."""

SILENCE = 1e-5
"""Peak amplitude, of full scale 1, below which a recording is silent: less than a bit of 16-bit audio."""


def decode(data: bytes, *, allow_empty: bool = False) -> tuple[NDArray[np.float32], int]:
    """Decode WAV, FLAC, MP3 or any other format of libsndfile.

    Returns:
        The waveform, shape (samples,), float32, channels averaged, and its sample rate in hertz.

    Raises:
        RowError: `empty_audio` for no bytes, or no samples unless `allow_empty`; `bad_audio` for bytes that
            are not audio or samples that are not finite; `long_audio` for more than `MOST_SECONDS`.
        UsageError: When soundfile is not installed.
    """
    if not data:
        raise RowError("empty_audio", "the recording holds no bytes")
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as stream:
            rate = int(stream.samplerate)
            _refuse_long(stream.frames, rate, stream.channels)
            waveform = _mono(stream, rate)
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise RowError("bad_audio", f"the recording cannot be decoded ({_reason(error)})") from error
    if len(waveform) == 0 and not allow_empty:
        raise RowError("empty_audio", "the recording is 0 samples long")
    if not np.isfinite(waveform).all():
        raise RowError("bad_audio", "the recording holds samples that are not numbers (NaN or infinite)")
    return waveform, rate


def _refuse_long(frames: int, rate: int, channels: int) -> None:
    """Refuse by the header, before decoding: a constant tone compresses 1000 times."""
    if not 0 < rate <= MOST_RATE or not 0 < channels <= MOST_CHANNELS:
        raise RowError(
            "bad_audio", f"the recording says that it has {channels} channel(s) of {rate} samples per second"
        )
    if frames > MOST_SECONDS * rate:
        raise RowError(
            "long_audio",
            f"the recording is {frames / rate:,.0f} s long, and at most {MOST_SECONDS} s are taken: cut it",
        )


def _mono(stream: Any, rate: int) -> NDArray[np.float32]:
    """Decode block by block: needs memory for one channel only, and stops when the header understates."""
    blocks: list[NDArray[np.float32]] = []
    count = 0
    while len(block := stream.read(_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1, dtype=np.float32))
        count += len(block)
        _refuse_long(count, rate, stream.channels)
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)


def encode_wav(waveform: NDArray[np.floating], rate: int) -> bytes:
    """Encode a mono waveform, shape (samples,), full scale 1, as 16-bit WAV; louder samples are clipped."""
    buffer = io.BytesIO()
    samples = np.clip(np.asarray(waveform, dtype=np.float32), -1.0, 1.0)
    _soundfile().write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def check_recording(data: bytes) -> int:
    """Check that a recording can be explained; return its sample rate in hertz.

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
