"""Encodes conversations as LFM2-Audio prompts: token ids, and features of the recordings between them."""

import hashlib
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mllm_shap import AudioPart, ConversationSnapshot, Message, TextPart
from mllm_shap.alignment.io import decode_audio

from mllm_shapx.errors import RowError
from mllm_shapx.models.byte_cache import ByteCache

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

    @property
    def nbytes(self) -> int:
        """Return the bytes of the features."""
        return int(self.features.nbytes)


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
        self._preprocessor = processor.audio
        self.recordings: ByteCache[Recording] = ByteCache(FEATURE_CACHE_BYTES)
        """Recently used recordings: coalitions of one row share many."""
        # Fast tokenizers are not thread-safe; the same one decodes answers.
        self._lock = threading.Lock()
        self.tokens_of = lru_cache(maxsize=4096)(self._tokenize)
        """Returns the tokens of a text alone, without special tokens."""

    def encode(self, snapshot: ConversationSnapshot, assistant_prefill: str | None) -> LiquidPrompt:
        """Return the chat, one turn per message, up to the assistant's answer.

        Raises:
            RowError: `bad_audio` when a recording cannot be decoded.
        """
        ids = list(self.tokens_of("<|startoftext|>"))
        recordings: list[tuple[int, Recording]] = []
        for message in snapshot.messages():
            ids.extend(self.tokens_of(f"<|im_start|>{message.role.value}\n"))
            self._add_content(message, ids, recordings)
            ids.extend(self.tokens_of("<|im_end|>\n"))
        ids.extend(self.tokens_of("<|im_start|>assistant\n"))
        if assistant_prefill:
            ids.extend(self.tokens_of(assistant_prefill))
        return LiquidPrompt(tuple(ids), tuple(recordings))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of generated tokens without special tokens."""
        with self._lock:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _add_content(self, message: Message, ids: list[int], recordings: list[tuple[int, Recording]]) -> None:
        for part in message.content:
            if isinstance(part, TextPart):
                if part.text:
                    ids.extend(self.tokens_of(part.text))
                continue
            recording = self._recording(part)
            if recording is not None:
                recordings.append((len(ids), recording))
                ids.extend([0] * recording.positions)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _recording(self, part: AudioPart) -> Recording | None:
        """Return a recording, None when it is empty."""
        key = hashlib.blake2b(part.data(), digest_size=16).digest()
        recording = self.recordings.get(key)
        if recording is None:
            features = self._features(part)
            if features is None:
                return None
            from liquid_audio.utils import mel2emb_len

            recording = Recording(key, features, int(mel2emb_len(features.shape[1])))
            self.recordings.put(key, recording)
        return recording

    def _features(self, part: AudioPart) -> torch.Tensor | None:
        """Return the package's log-mel features, computed on the CPU; None for an empty recording."""
        try:
            waveform, rate = decode_audio(part.data())
        except ValueError as error:
            raise RowError("bad_audio", f"a recording cannot be decoded: {error}") from error
        if not len(waveform):
            return None
        with torch.inference_mode():
            wave = torch.from_numpy(waveform)[None]
            if rate != SAMPLE_RATE:
                wave = _resampler(rate)(wave)
            wave = torch.nn.functional.pad(wave, (0, max(0, MIN_SAMPLES - wave.shape[1])))
            features: torch.Tensor = self._preprocessor(wave, torch.tensor([wave.shape[1]]))[0][0]
        return features


@lru_cache(maxsize=16)
def _resampler(rate: int) -> Any:
    """Return the filter of `torchaudio.functional.resample`, built once instead of once per recording."""
    from torchaudio.transforms import Resample

    return Resample(rate, SAMPLE_RATE, dtype=torch.float32)
