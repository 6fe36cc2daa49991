"""Players of prompts with recordings, as mllm_shap partition plugins: audio segments, and words."""

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal

from mllm_shap import (
    AudioPart,
    ConversationSnapshot,
    Message,
    PlayerSet,
    PlayerSpan,
    PluginContext,
    SgpaSegmentPartitioner,
)
from mllm_shap.alignment import SpectrogramGuidedAligner, Wav2Vec2Ctc
from mllm_shap.domain.enums import RoleName
from mllm_shap.protocols.plugin import PluginOptions
from pydantic import Field

from mllm_shapx.config.models import AudioSegmentation
from mllm_shapx.data.audio import decode
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.explaining.players import messages_of, text_players
from mllm_shapx.planning.players import PlayerRule

ALIGNER = "facebook/wav2vec2-base-960h"
ALIGNER_REVISION = "22aad52d435eb6dbaf354bdad9b0da84ce7d6156"
"""Pinned commit of the `sgpa` aligner, mllm_shap's default."""


class RawWindowsOptions(PluginOptions):
    """Options of the `raw_windows` partition."""

    window_ms: float = Field(default=80.0, gt=0.0)
    """Length of a window; the last one of a recording may be shorter."""
    token_filter: Literal["exclude_punctuation", "none"] = "exclude_punctuation"  # noqa: S105 -- no password
    """Selects the words of a written piece that are players."""
    kept_words: list[str] = Field(default_factory=list)
    """Words of a written piece that are not players, casefolded and without surrounding punctuation."""
    roles: list[RoleName] = Field(default=["user"])
    """Roles whose pieces become players; other messages are always present."""


class RawWindowPartitioner:
    """Makes each window of a recording a player, and each word of a written message: see `raw_windows`."""

    options_model: ClassVar[type[PluginOptions]] = RawWindowsOptions
    name = "raw_windows"

    def __init__(
        self, context: PluginContext | None = None, options: RawWindowsOptions | None = None
    ) -> None:
        """Use `options`, else those of the `context`."""
        given = {} if context is None else dict(context.options)
        self._options = options or RawWindowsOptions.model_validate(given)

    def partition(self, snapshot: ConversationSnapshot) -> PlayerSet:
        """Return the players in conversation order."""
        options = self._options
        rule = PlayerRule(
            options.token_filter, kept_words=tuple(options.kept_words), roles=tuple(options.roles)
        )
        return raw_windows(snapshot, options.window_ms, rule)


def raw_windows(snapshot: ConversationSnapshot, window_ms: float, rule: PlayerRule) -> PlayerSet:
    """Return the windows of recordings and the words of written messages, in conversation order.

    A message's recording is its first audio part. Text beside a recording is its transcript: it is not a
    player and in no coalition.

    Raises:
        RowError: `no_players` when there is no possible player; `bad_audio` when a recording cannot be
            decoded.
    """
    players: list[tuple[str, PlayerSpan]] = []
    hidden: list[int] = []
    for index, prefix, message in messages_of(snapshot):
        recording = _recording(message)
        if recording is not None and message.text:
            hidden.append(index)
        if message.role.value not in rule.roles:
            continue
        spans = (
            text_players(message, index, rule)
            if recording is None
            else _windows(recording, index, window_ms, message.speaker)
        )
        players += [(f"{prefix}:{number}", span) for number, span in enumerate(spans)]
    if not players:
        raise RowError("no_players", "the prompt has no stretch of audio and no word that could be a player")
    ids, all_spans = zip(*players, strict=True)
    return PlayerSet(player_ids=ids, spans=all_spans, hidden_text=tuple(hidden))


class SgpaOptions(PluginOptions):
    """Options of the `sgpa_speech` partition."""

    model_id: str = ALIGNER
    """Hub id or directory of the aligner, a Wav2Vec2 CTC model."""
    revision: str | None = ALIGNER_REVISION
    """Its hub commit."""
    device: str = "cpu"
    """Its torch device."""


class SgpaPartitioner:
    """Makes the audio segment of each word of a transcript a player.

    The segments are those of mllm_shap's `sgpa_segments`. The text beside a recording is its transcript. It
    serves only the alignment; the model does not read it. Written messages are not players here.
    """

    options_model: ClassVar[type[PluginOptions]] = SgpaOptions
    name = "sgpa_speech"

    def __init__(self, context: PluginContext | None = None, options: SgpaOptions | None = None) -> None:
        """Use `options`, else those of the `context`."""
        given = {} if context is None else dict(context.options)
        self._options = options or SgpaOptions.model_validate(given)

    def partition(self, snapshot: ConversationSnapshot) -> PlayerSet:
        """Return the players in conversation order.

        Raises:
            RowError: `no_transcript` when a recording has no text to align, `not_aligned` when the text does
                not fit the recording, `no_players` when there is no recording.
            ModelError: When the aligner cannot be loaded.
        """
        spoken = [index for index, _, message in messages_of(snapshot) if _recording(message) is not None]
        if not spoken:
            raise RowError(
                "no_players", "audio_segmentation.method 'sgpa' needs a recording, and there is none"
            )
        messages = snapshot.messages()
        if not all(messages[index].text.strip() for index in spoken):
            raise RowError(
                "no_transcript",
                "audio_segmentation.method 'sgpa' aligns a recording with its text, and the row has none; "
                "map dataset.column_mapping.text, or use method 'raw'",
            )
        aligner = _aligner(self._options)
        try:
            players = SgpaSegmentPartitioner(aligner=aligner).partition(snapshot)
        except ValueError as error:
            raise RowError("not_aligned", f"the text does not fit its recording: {error}") from error
        return replace(players, hidden_text=tuple(spoken))


@lru_cache(maxsize=1)
def _aligner(options: SgpaOptions) -> SpectrogramGuidedAligner:
    """Load the aligner once per process."""
    try:
        return SpectrogramGuidedAligner(Wav2Vec2Ctc(options.model_id, options.revision, options.device))
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"audio_segmentation.method 'sgpa' needs the aligner {options.model_id} at revision "
            f"{options.revision}, and it cannot be loaded: {reason}; download it once (hf download "
            f"{options.model_id}), or use method 'raw', which needs no model"
        ) from error


def audio_player_set(
    snapshot: ConversationSnapshot,
    segmentation: AudioSegmentation,
    rule: PlayerRule,
) -> PlayerSet:
    """Return the players of a prompt with recordings, in conversation order.

    For method `sgpa`, spoken messages of `snapshot` contain the transcript beside the recording.

    Raises:
        RowError: When the prompt cannot be split into players; see the partitioners.
        ModelError: When the aligner of `sgpa` cannot be loaded.
    """
    if segmentation.method == "sgpa":
        options = SgpaOptions(device=segmentation.aligner_device or "cpu")
        return SgpaPartitioner(options=options).partition(snapshot)
    return raw_windows(snapshot, segmentation.window_ms, rule)


def window_bounds(samples: int, rate: int, window_ms: float) -> list[tuple[int, int]]:
    """Return `[start, end)` sample ranges of consecutive windows over `samples` samples at `rate` hertz.

    Window i begins at the sample nearest to i * window_ms, so that rounding does not add up.
    """
    per_window = rate * window_ms / 1000.0
    count = math.ceil(samples / per_window - 1e-9)
    edges = [*(min(round(number * per_window), samples) for number in range(count)), samples]
    return [(start, end) for start, end in pairwise(edges) if end > start]


def _windows(
    recording: AudioPart, message_index: int, window_ms: float, speaker: str | None
) -> list[PlayerSpan]:
    waveform, rate = decode(recording.data())
    return [
        PlayerSpan(
            message_index=message_index,
            start=0,
            end=0,
            text="",
            speaker=speaker,
            label=f"{start / rate:.2f}-{end / rate:.2f} s",
            samples=(start, end),
        )
        for start, end in window_bounds(len(waveform), rate, window_ms)
    ]


def _recording(message: Message) -> AudioPart | None:
    return next((part for part in message.content if isinstance(part, AudioPart)), None)
