"""Replaces absent players in a coalition's prompt."""

import hashlib
from collections.abc import Sequence

import numpy as np
from mllm_shap import (
    AudioPart,
    CoalitionMask,
    ConversationSnapshot,
    DeletePolicy,
    Message,
    NeutralPolicy,
    PadPolicy,
    PlayerSet,
    PlayerSpan,
    Turn,
)
from mllm_shap.alignment.io import decode_audio, encode_wav
from mllm_shap.masking.audio import hide_text, render_audio
from mllm_shap.masking.tokens import render_spans
from mllm_shap.protocols.masking import AbsencePolicy
from numpy.typing import NDArray

from mllm_shapx.config.vocabulary import Absence, AudioAbsence
from mllm_shapx.planning.runs import RunSpec

PLACEHOLDER = PadPolicy().placeholder
FILL_CHAR = NeutralPolicy().fill_char


def absence_policy(run: RunSpec) -> AbsencePolicy:
    """Return the policy that renders the coalitions of a run: mllm_shap's, or ours for recordings."""
    shap = run.shap
    audio: AudioAbsence = shap.audio_absence or ("cut" if shap.absence == "delete" else "silence")
    if run.modality.has_audio_input and (shap.absence, audio) != ("delete", "cut"):
        return _MixedPolicy(shap.absence, shap.absence_text, audio)
    if shap.absence == "pad":
        return PadPolicy(placeholder=shap.absence_text or PLACEHOLDER)
    if shap.absence == "neutral":
        return NeutralPolicy(fill_char=shap.absence_text or FILL_CHAR)
    return DeletePolicy()


class _MixedPolicy:
    """Renders absent text by one policy and absent segments of recordings by another.

    The library has one policy for both, and would write the placeholder of a spoken player as text.
    """

    def __init__(self, absence: Absence, text: str | None, audio: AudioAbsence) -> None:
        self._absence = absence
        self._text = text
        self._audio = audio

    @property
    def name(self) -> str:
        """Return the names of both absences."""
        return f"{self._absence}+{self._audio}"

    def apply(
        self, snapshot: ConversationSnapshot, players: PlayerSet, mask: CoalitionMask
    ) -> ConversationSnapshot:
        """Return the conversation without the players outside `mask`."""
        mask.validate_against(players)
        spans = list(zip(players.spans, mask.present, strict=True))
        written = [(span, present) for span, present in spans if span.samples is None]
        rendered = render_spans(
            snapshot,
            [span for span, _ in written],
            [span.text if present else self._in_place_of(span) for span, present in written],
        )
        if self._audio == "noise":
            absent = [span for span, present in spans if span.samples is not None and not present]
            rendered = _with_noise(rendered, absent)
        else:
            rendered = render_audio(rendered, players.spans, mask.present, cut=self._audio == "cut")
        return hide_text(rendered, players.hidden_text)

    def _in_place_of(self, span: PlayerSpan) -> str | None:
        if self._absence == "delete":
            return None
        if self._absence == "pad":
            return self._text or PLACEHOLDER
        return (self._text or FILL_CHAR) * len(span.text)


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
