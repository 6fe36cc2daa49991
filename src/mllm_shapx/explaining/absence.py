"""Replaces absent players in a coalition's prompt."""

import hashlib
from collections.abc import Sequence

import numpy as np
from mllm_shap import (
    AudioPart,
    CoalitionMask,
    ConversationSnapshot,
    Message,
    PlayerSet,
    PlayerSpan,
    PluginGroup,
    Turn,
)
from mllm_shap.alignment.io import decode_audio, encode_wav
from mllm_shap.masking.audio import hide_text, render_audio
from mllm_shap.protocols.masking import AbsencePolicy
from numpy.typing import NDArray

from mllm_shapx.config.vocabulary import AudioAbsence
from mllm_shapx.explaining.settings import flat_config, resolve
from mllm_shapx.planning.runs import RunSpec


def absence_policy(run: RunSpec) -> AbsencePolicy:
    """Return the policy that renders the coalitions of a run: mllm_shap's, or ours for recordings."""
    shap = run.shap
    policy: AbsencePolicy = resolve(flat_config(run), PluginGroup.ABSENCE_POLICIES, shap.absence)
    audio: AudioAbsence = shap.audio_absence or ("cut" if shap.absence == "delete" else "silence")
    if run.modality.has_audio_input and (shap.absence, audio) != ("delete", "cut"):
        return _MixedPolicy(policy, audio)
    return policy


class _MixedPolicy:
    """Renders absent text by a policy of mllm_shap, and absent segments of recordings by another absence.

    The library has one policy for both, and would write the placeholder of a spoken player as text.
    """

    def __init__(self, text: AbsencePolicy, audio: AudioAbsence) -> None:
        self._text = text
        self._audio = audio

    @property
    def name(self) -> str:
        """Return the names of both absences."""
        return f"{self._text.name}+{self._audio}"

    def apply(
        self, snapshot: ConversationSnapshot, players: PlayerSet, mask: CoalitionMask
    ) -> ConversationSnapshot:
        """Return the conversation without the players outside `mask`."""
        mask.validate_against(players)
        everyone = list(zip(players.player_ids, players.spans, mask.present, strict=True))
        written = [player for player in everyone if player[1].samples is None]
        if written:
            ids, spans, present = zip(*written, strict=True)
            snapshot = self._text.apply(snapshot, PlayerSet(ids, spans), CoalitionMask(present))
        if self._audio == "noise":
            absent = [span for _, span, is_present in everyone if span.samples is not None and not is_present]
            snapshot = _with_noise(snapshot, absent)
        else:
            snapshot = render_audio(snapshot, players.spans, mask.present, cut=self._audio == "cut")
        return hide_text(snapshot, players.hidden_text)


def _with_noise(snapshot: ConversationSnapshot, absent: Sequence[PlayerSpan]) -> ConversationSnapshot:
    """Return the conversation with white noise in place of the samples of `absent`."""
    if not absent:
        return snapshot
    turns, index = [], 0
    for turn in snapshot.turns:
        messages = []
        for message in turn.messages:
            ranges = [span.samples for span in absent if span.message_index == index and span.samples]
            messages.append(_noisy(message, index, ranges) if ranges else message)
            index += 1
        turns.append(Turn(messages=tuple(messages)))
    return ConversationSnapshot.from_turns(tuple(turns))


def _noisy(message: Message, index: int, ranges: Sequence[tuple[int, int]]) -> Message:
    part = next(part for part in message.content if isinstance(part, AudioPart))
    waveform, rate = decode_audio(part.data())
    edited = waveform.copy()
    for start, end in ranges:
        edited[start:end] = _noise(waveform[start:end], index, start)
    return message.with_audio(AudioPart(encode_wav(edited, rate), rate))


def _noise(stretch: NDArray[np.float32], message_index: int, start: int) -> NDArray[np.float32]:
    """Return white noise as loud as the segment.

    Only its position decides the draws, so a coalition's prompt is always rendered the same.
    """
    seed = hashlib.sha256(f"{message_index}\0{start}".encode()).digest()
    draws = np.random.default_rng(int.from_bytes(seed[:8], "big")).standard_normal(len(stretch))
    loudness = float(np.sqrt(np.mean(np.square(stretch, dtype=np.float64)))) if len(stretch) else 0.0
    return np.clip(draws * loudness, -1.0, 1.0).astype(np.float32)
