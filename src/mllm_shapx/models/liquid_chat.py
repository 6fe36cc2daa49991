"""Encodes conversations as LFM2-Audio prompts: token ids, and features of the recordings between them."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mllm_shap import AudioPart, ConversationSnapshot, Message, TextPart
from mllm_shap.alignment.io import decode_audio

from mllm_shapx.errors import RowError

SAMPLE_RATE = 16_000
"""The model's input rate, in hertz."""

MIN_SAMPLES = 320
"""Shortest recording with usable features: two feature frames of 10 ms at `SAMPLE_RATE`.
Shorter recordings are padded with silence; empty recordings are left out of the prompt."""

FEATURE_CACHE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A recording as input of the model's encoder."""

    key: bytes
    """Digest of the encoded audio: equal recordings have equal keys."""
    features: torch.Tensor
    """Log-mel features, float32, shaped (bands, feature frames)."""
    positions: int
    """Positions of the recording in the prompt: one per 8 feature frames, rounded up."""


@dataclass(frozen=True, slots=True, eq=False)
class LiquidPrompt:
    """A chat encoded for LFM2-Audio."""

    token_ids: tuple[int, ...]
    """One per position; 0 at positions of a recording."""
    recordings: tuple[tuple[int, Recording], ...]
    """(first position, recording), in order."""

    @property
    def length(self) -> int:
        """Return the positions that the prompt takes in the model's context."""
        return len(self.token_ids)


class ChatEncoder:
    """Encodes conversations the way the package's `ChatState` does. May be used from several threads."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.text
        self._features = _FeatureCache(_FeatureExtractor(processor.audio))
        # Fast tokenizers are not thread-safe; the same one decodes answers.
        self._lock = threading.Lock()
        self._tokenize = lru_cache(maxsize=4096)(self._tokenize_uncached)

    def encode(self, snapshot: ConversationSnapshot, assistant_prefill: str | None) -> LiquidPrompt:
        """Return the chat, one turn per message, up to the assistant's answer.

        Raises:
            RowError: `bad_audio` when a recording cannot be decoded.
        """
        ids = list(self._tokenize("<|startoftext|>"))
        recordings: list[tuple[int, Recording]] = []
        for message in snapshot.messages():
            ids.extend(self._tokenize(f"<|im_start|>{message.role.value}\n"))
            self._add_content(message, ids, recordings)
            ids.extend(self._tokenize("<|im_end|>\n"))
        ids.extend(self._tokenize("<|im_start|>assistant\n"))
        if assistant_prefill:
            ids.extend(self._tokenize(assistant_prefill))
        return LiquidPrompt(tuple(ids), tuple(recordings))

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text alone, without special tokens."""
        return self._tokenize(text)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of generated tokens without special tokens."""
        with self._lock:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def forget_recordings(self) -> None:
        """Drop the cached features."""
        self._features.clear()

    def _add_content(self, message: Message, ids: list[int], recordings: list[tuple[int, Recording]]) -> None:
        for part in message.content:
            if isinstance(part, TextPart):
                if part.text:
                    ids.extend(self._tokenize(part.text))
                continue
            recording = self._features.get(part)
            if recording is not None:
                recordings.append((len(ids), recording))
                ids.extend([0] * recording.positions)

    def _tokenize_uncached(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))


class _FeatureExtractor:
    """Computes the package's log-mel features on the CPU."""

    def __init__(self, preprocessor: Any) -> None:
        self._preprocessor = preprocessor
        self._resampler = lru_cache(maxsize=16)(_build_resampler)

    def __call__(self, part: AudioPart, key: bytes) -> Recording | None:
        from liquid_audio.utils import mel2emb_len

        try:
            waveform, rate = decode_audio(part.data())
        except ValueError as error:
            raise RowError("bad_audio", f"a recording cannot be decoded: {error}") from error
        if not len(waveform):
            return None
        with torch.inference_mode():
            wave = torch.from_numpy(waveform)[None]
            if rate != SAMPLE_RATE:
                wave = self._resampler(rate)(wave)
            wave = torch.nn.functional.pad(wave, (0, max(0, MIN_SAMPLES - wave.shape[1])))
            features, _ = self._preprocessor(wave, torch.tensor([wave.shape[1]]))
        return Recording(key, features[0], int(mel2emb_len(features.shape[2])))


def _build_resampler(rate: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the filter of `torchaudio.functional.resample`, built once instead of once per recording."""
    from torchaudio.transforms import Resample

    resampler: Callable[[torch.Tensor], torch.Tensor] = Resample(rate, SAMPLE_RATE, dtype=torch.float32)
    return resampler


class _FeatureCache:
    """Features of recently used recordings, by content: coalitions of one row share many recordings."""

    def __init__(self, extract: _FeatureExtractor) -> None:
        self._extract = extract
        self._held: OrderedDict[bytes, Recording | None] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, part: AudioPart) -> Recording | None:
        key = hashlib.blake2b(part.data(), digest_size=16).digest()
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        recording = self._extract(part, key)
        with self._lock:
            if key not in self._held:
                self._held[key] = recording
                self._bytes += _size(recording)
            while self._bytes > FEATURE_CACHE_BYTES:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= _size(dropped)
        return recording

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
            self._bytes = 0


def _size(recording: Recording | None) -> int:
    return 0 if recording is None else recording.features.nbytes
