"""Embeds LFM2-Audio prompts as one left-padded batch; equal recordings are encoded once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_shapx.models.byte_cache import ByteCache
from mllm_shapx.models.liquid_chat import LiquidPrompt, Recording

ENCODED_CACHE_BYTES = 256 * 2**20
WORTHWHILE_GROUP = 8
"""Recordings that are always encoded together, regardless of padding."""
MOST_PADDING = 1.2
"""Largest ratio of padded to real frames; further recordings go to the next pass."""
FRAMES_PER_PASS = 48_000
"""Most feature frames per encoder pass, padding included (8 minutes of audio)."""


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """A batch of prompts, padded on the left."""

    embeddings: torch.Tensor
    """Shaped (prompts, positions, hidden); 0 at padding."""
    lengths: tuple[int, ...]
    """Positions of each prompt without padding."""

    def mask(self) -> torch.Tensor | None:
        """Return 1 for prompt, 0 for padding, int64, shaped (prompts, positions); None without padding."""
        width = self.embeddings.shape[1]
        if all(length == width for length in self.lengths):
            return None
        lengths = torch.tensor(self.lengths, device=self.embeddings.device)
        columns = torch.arange(width, device=self.embeddings.device)
        return (columns[None] >= width - lengths[:, None]).long()


class PromptEmbedder:
    """Embeds prompts with the model's token table, audio encoder and adapter."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.encoded: ByteCache[torch.Tensor] = ByteCache(ENCODED_CACHE_BYTES)
        """Encoded recordings, shaped (positions, hidden), by their key."""
        self.recordings_encoded = 0
        """Recordings encoded so far."""

    def batch(self, prompts: Sequence[LiquidPrompt]) -> PrefillBatch:
        """Return the prompts' embeddings as one batch."""
        encoded = self._encode(recording for prompt in prompts for _, recording in prompt.recordings)
        width = max(prompt.length for prompt in prompts)
        pads = [width - prompt.length for prompt in prompts]
        ids = [[0] * pad + list(prompt.token_ids) for pad, prompt in zip(pads, prompts, strict=True)]
        table = self._model.lfm.embed_tokens
        embeddings = table(torch.tensor(ids, device=table.weight.device))
        for row, (pad, prompt) in enumerate(zip(pads, prompts, strict=True)):
            embeddings[row, :pad] = 0
            for start, recording in prompt.recordings:
                first = pad + start
                embeddings[row, first : first + recording.positions] = encoded[recording.key]
        return PrefillBatch(embeddings, tuple(prompt.length for prompt in prompts))

    def _encode(self, recordings: Iterable[Recording]) -> dict[bytes, torch.Tensor]:
        """Return the adapted encoder output of each recording, shaped (positions, hidden), by its key."""
        wanted = {recording.key: recording for recording in recordings}
        found = {key: output for key in wanted if (output := self.encoded.get(key)) is not None}
        missing = [recording for key, recording in wanted.items() if key not in found]
        for group in _grouped(missing):
            for recording, output in zip(group, self._run_encoder(group), strict=True):
                found[recording.key] = output
                self.encoded.put(recording.key, output)
        return found

    def _run_encoder(self, recordings: Sequence[Recording]) -> list[torch.Tensor]:
        weight = self._model.lfm.embed_tokens.weight
        lengths = torch.tensor([item.features.shape[1] for item in recordings], device=weight.device)
        padded = torch.nn.utils.rnn.pad_sequence([item.features.mT for item in recordings], batch_first=True)
        output, _ = self._model.conformer(padded.mT.to(device=weight.device, dtype=weight.dtype), lengths)
        rows = torch.cat([output[i, :, : item.positions].mT for i, item in enumerate(recordings)])
        adapted = self._model.audio_adapter(rows)
        self.recordings_encoded += len(recordings)
        # Copies: a cached view would keep its whole batch in memory.
        return [part.clone() for part in adapted.split([item.positions for item in recordings])]


def _grouped(recordings: Sequence[Recording]) -> Iterable[list[Recording]]:
    """Yield recordings of similar length together, at most `FRAMES_PER_PASS` padded frames at a time."""
    group: list[Recording] = []
    frames = 0
    for recording in sorted(recordings, key=lambda item: item.features.shape[1]):
        length = recording.features.shape[1]
        padded, real = length * (len(group) + 1), frames + length
        wasteful = len(group) >= WORTHWHILE_GROUP and padded > MOST_PADDING * real
        if group and (wasteful or padded > FRAMES_PER_PASS):
            yield group
            group, frames = [], 0
        group.append(recording)
        frames += length
    if group:
        yield group
