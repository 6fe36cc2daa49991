"""Builds the conversation of a sample file: turns, pieces, and the players' values."""

from collections.abc import Sequence

from mllm_shap import AudioPart, ConversationSnapshot, Message, PlayerSet, PlayerSpan, Role, TextPart

from mllm_shapx.records.results import (
    ASSISTANT,
    AUDIO,
    SYSTEM,
    TEXT,
    USER,
    AttributionSummary,
    AudioPiece,
    ConversationEntry,
)

_ROLES = {Role.USER: USER, Role.ASSISTANT: ASSISTANT, Role.SYSTEM: SYSTEM}

Turn = tuple[ConversationEntry, ...]


def conversation_entries(
    snapshot: ConversationSnapshot, players: PlayerSet, values: Sequence[float], response: str
) -> tuple[Turn, ...]:
    """Return the turns of docs/formats.md: the system prompt, one turn per user message, the model's answer.

    Args:
        snapshot: The whole conversation.
        players: Its players; each lies within one message.
        values: One normalized value per player.
        response: The model's answer to the whole prompt.
    """
    owned: dict[int, list[tuple[PlayerSpan, float]]] = {}
    for span, value in zip(players.spans, values, strict=True):
        owned.setdefault(span.message_index, []).append((span, value))
    system: list[ConversationEntry] = []
    turns: list[Turn] = []
    for index, message in enumerate(snapshot.messages()):
        entries = _message_entries(message, owned.get(index, []))
        if message.role is Role.SYSTEM:
            system.extend(entries)
        else:
            turns.append(tuple(entries))
    answer = ConversationEntry(TEXT, (ASSISTANT,), (response,), None)
    # An empty system prompt is not a message, but it is a turn.
    first = tuple(system) or (ConversationEntry(TEXT, (SYSTEM,), ("",), None),)
    return (first, *turns, (answer,))


def attribution_summary(players: PlayerSet, values: Sequence[float]) -> AttributionSummary:
    """Return the sums of absolute values of text and of audio players."""
    text = [abs(value) for span, value in zip(players.spans, values, strict=True) if span.samples is None]
    audio = [
        abs(value) for span, value in zip(players.spans, values, strict=True) if span.samples is not None
    ]
    sum_text, sum_audio = sum(text), sum(audio)
    total = sum_text + sum_audio
    return AttributionSummary(
        abs_sum_text=sum_text,
        abs_sum_audio=sum_audio,
        frac_text=sum_text / total if total else 0.0,
        frac_audio=sum_audio / total if total else 0.0,
        count_text_tokens=len(text),
        count_audio_segments=len(audio),
    )


def _message_entries(message: Message, players: list[tuple[PlayerSpan, float]]) -> list[ConversationEntry]:
    role = _ROLES[message.role]
    entries = []
    if any(isinstance(part, TextPart) for part in message.content):
        entries.append(_text_entry(message.text, role, [item for item in players if item[0].samples is None]))
    spoken = [item for item in players if item[0].samples is not None]
    entries += [_audio_entry(part, role, spoken) for part in message.content if isinstance(part, AudioPart)]
    return entries


def _text_entry(text: str, role: int, players: list[tuple[PlayerSpan, float]]) -> ConversationEntry:
    """Split the text into pieces that join to it. The space before a player belongs to its piece."""
    pieces: list[str] = []
    values: list[float | None] = []
    cursor = 0
    for span, value in sorted(players, key=lambda item: item[0].start):
        gap = text[cursor : span.start]
        if gap.strip():
            pieces.append(gap.rstrip())
            values.append(None)
            gap = gap[len(gap.rstrip()) :]
        pieces.append(gap + text[span.start : span.end])
        values.append(value)
        cursor = span.end
    if text[cursor:] or not pieces:
        pieces.append(text[cursor:])
        values.append(None)
    has_values = any(value is not None for value in values)
    return ConversationEntry(
        TEXT, (role,) * len(pieces), tuple(pieces), tuple(values) if has_values else None
    )


def _audio_entry(part: AudioPart, role: int, players: list[tuple[PlayerSpan, float]]) -> ConversationEntry:
    """Split the recording into one piece per segment; without players it is one piece."""
    if not players:
        return ConversationEntry(AUDIO, (role,), (AudioPiece(len(part.data())),), None)
    ordered = sorted(players, key=lambda item: item[0].samples or (0, 0))
    bytes_per_sample = 2
    # Windows of `raw` have no text; segments of `sgpa` have their spoken word.
    pieces = []
    for span, _ in ordered:
        start, end = span.samples or (0, 0)
        pieces.append(AudioPiece((end - start) * bytes_per_sample, span.text or None))
    return ConversationEntry(
        AUDIO, (role,) * len(ordered), tuple(pieces), tuple(value for _, value in ordered)
    )
