"""The audio demo's task: recordings of everyday noise in which one planted sound decides the answer.

A recording is a sequence of stretches of equal length. All but one are background: hiss, hum, rumble, clicks
or crackle. One is the planted sound, for example a bell. The answer is a function of the stretches, in any
number and order, so every coalition of stretches has a right answer: the sentence of the planted sound, or
the neutral one without it.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SYSTEM_PROMPT = "You are a helpful assistant."
QUESTION = "what do you hear in this recording"
RATE = 16_000
STRETCH_MS = 240
"""Length of a stretch in ms: three input frames of LFM2-Audio."""
STRETCH = RATE * STRETCH_MS // 1000
"""Length of a stretch in audio samples."""
MIN_STRETCHES, MAX_STRETCHES = 6, 8
NEUTRAL = "nothing but plain background noise"

Samples = NDArray[np.float64]
Draw = np.random.Generator
Sound = Callable[[Draw, Samples], Samples]
"""(Random draw, times in seconds with shape (samples,)) -> waveform with a peak near 1."""


def _tone(rng: Draw, times: Samples, pitch: float) -> Samples:
    return np.sin(2 * np.pi * pitch * rng.uniform(0.96, 1.04) * times + rng.uniform(0, 2 * np.pi))


def _sweep(rng: Draw, times: Samples, start: float, end: float) -> Samples:
    """Return a tone that glides from `start` to `end` hertz."""
    share = times / times[-1]
    pitch = rng.uniform(0.96, 1.04) * start * (end / start) ** share
    return np.sin(2 * np.pi * np.cumsum(pitch) / RATE)


def _bell(rng: Draw, times: Samples) -> Samples:
    partials = ((1.0, 1.0), (2.0, 0.6), (2.4, 0.5), (3.0, 0.3), (4.5, 0.2))
    struck = sum(
        (weight * _tone(rng, times, 620 * ratio) for ratio, weight in partials), np.zeros_like(times)
    )
    return struck * np.exp(-9 * times)


def _drum(rng: Draw, times: Samples) -> Samples:
    beaten: Samples = _tone(rng, times, 85) * np.exp(-30 * (times % (times[-1] / 3)))
    return beaten


def _siren(rng: Draw, times: Samples) -> Samples:
    pitch = 1100 + 450 * np.sin(2 * np.pi * 9 * times + rng.uniform(0, 2 * np.pi))
    return np.sin(2 * np.pi * np.cumsum(pitch) / RATE)


def _cricket(rng: Draw, times: Samples) -> Samples:
    return _tone(rng, times, 4800) * (np.sin(2 * np.pi * 16 * times + rng.uniform(0, 2 * np.pi)) > 0)


def _pager(rng: Draw, times: Samples) -> Samples:
    return _tone(rng, times, 2100) * ((times * 12.5 + rng.uniform(0, 0.3)) % 1 < 0.5)


PLANTED: Mapping[str, Sound] = {
    "bell": _bell,
    "drum": _drum,
    "siren": _siren,
    "cricket": _cricket,
    "pager": _pager,
    "whistle": lambda rng, times: _sweep(rng, times, 700, 3400),
    "slide": lambda rng, times: _sweep(rng, times, 3600, 500),
}
SENTENCES: Mapping[str, str] = {
    "bell": "a church bell is ringing",
    "drum": "someone beats an old drum",
    "siren": "police cars pass with sirens",
    "cricket": "crickets chirp on summer nights",
    "pager": "your pager beeps very loudly",
    "whistle": "the kettle starts to whistle",
    "slide": "children race down long slides",
}


def _hiss(rng: Draw, times: Samples) -> Samples:
    return rng.standard_normal(len(times)) / 3


def _hum(rng: Draw, times: Samples) -> Samples:
    base = rng.uniform(90, 130)
    wave = np.zeros_like(times)
    for harmonic in (1, 2, 3):
        wave += _tone(rng, times, base * harmonic) / (2 * harmonic)
    return wave


def _rumble(rng: Draw, times: Samples) -> Samples:
    steps = np.cumsum(rng.standard_normal(len(times)))
    scaled: Samples = steps / (np.abs(steps).max() + 1e-9)
    return scaled


def _clicks(rng: Draw, times: Samples) -> Samples:
    wave = np.zeros_like(times)
    wave[rng.integers(0, len(times), 6)] = rng.choice([-1.0, 1.0], 6)
    return wave


def _crackle(rng: Draw, times: Samples) -> Samples:
    return rng.standard_normal(len(times)) * (rng.random(len(times)) < 0.03)


BACKGROUND: Mapping[str, Sound] = {
    "hiss": _hiss,
    "hum": _hum,
    "rumble": _rumble,
    "clicks": _clicks,
    "crackle": _crackle,
}


@dataclass(frozen=True)
class Recording:
    """A recording, stretch by stretch."""

    names: tuple[str, ...]
    """Name of each stretch's sound; at most one is planted."""
    stretches: tuple[Samples, ...]
    """Waveform of each, shape (STRETCH,), in [-1, 1]."""

    @property
    def planted_index(self) -> int | None:
        """Return the planted stretch's position, from 0; None if there is none."""
        return next((index for index, name in enumerate(self.names) if name in PLANTED), None)

    @property
    def answer(self) -> str:
        """Return the right answer."""
        index = self.planted_index
        return NEUTRAL if index is None else SENTENCES[self.names[index]]

    def only(self, present: Sequence[bool]) -> "Recording":
        """Return the recording without the absent stretches."""
        kept = [index for index, keep in enumerate(present) if keep]
        return Recording(
            tuple(self.names[index] for index in kept), tuple(self.stretches[index] for index in kept)
        )

    def wav(self) -> bytes:
        """Return the recording as 16-bit WAV."""
        import soundfile

        whole = np.concatenate([np.zeros(0), *self.stretches])
        buffer = io.BytesIO()
        soundfile.write(buffer, whole, RATE, format="WAV", subtype="PCM_16")
        return buffer.getvalue()


def draw_recording(rng: Draw, planted: str | None = None) -> Recording:
    """Return a recording with one planted sound, drawn if not given."""
    planted = planted or str(rng.choice(list(PLANTED)))
    names = [
        str(name) for name in rng.choice(list(BACKGROUND), rng.integers(MIN_STRETCHES, MAX_STRETCHES + 1))
    ]
    names[rng.integers(len(names))] = planted
    return Recording(tuple(names), tuple(_stretch(rng, name) for name in names))


def _stretch(rng: Draw, name: str) -> Samples:
    """Return one stretch with a random loudness, over faint noise."""
    times = np.arange(STRETCH) / RATE
    sound = {**PLANTED, **BACKGROUND}[name](rng, times) * rng.uniform(0.25, 0.6)
    return np.clip(sound + 0.004 * rng.standard_normal(STRETCH), -1.0, 1.0)


def draw_coalition(rng: Draw, recording: Recording) -> Recording:
    """Return `recording` without a random share of its stretches."""
    share = rng.random()
    return recording.only([bool(rng.random() < share) for _ in recording.names])


def demo_recordings(seed: int, count: int) -> list[Recording]:
    """Return the demo's rows, with every planted sound about equally often."""
    rng = np.random.default_rng(seed)
    sounds = list(PLANTED)
    return [draw_recording(rng, sounds[index % len(sounds)]) for index in range(count)]
