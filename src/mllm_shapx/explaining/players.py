"""The players of a row: what can be present in or absent from its prompt."""

from collections.abc import Collection
from typing import Literal

from mllm_shap import ConversationSnapshot, PlayerSet, PlayerSpan

from mllm_shapx.data.conversations import context_roles
from mllm_shapx.data.tokens import player_spans
from mllm_shapx.errors import RowError
from mllm_shapx.planning.runs import RunSpec

RoleName = Literal["user", "assistant", "system"]

_ROLES: tuple[RoleName, ...] = ("system", "user", "assistant")


def player_set(snapshot: ConversationSnapshot, run: RunSpec) -> PlayerSet:
    """Return the players of `snapshot`, in conversation order: words, or words and stretches of audio.

    Raises:
        RowError: `no_players` when the prompt holds none.
    """
    context = context_roles(run.chat)
    roles = [role for role in _ROLES if role not in context]
    if run.modality.has_audio_input:
        from mllm_shapx.explaining.audio_players import audio_player_set

        return audio_player_set(
            snapshot, run.audio_segmentation, run.shap.token_filter, explained_roles=roles
        )
    return text_player_set(snapshot, run.shap.token_filter, roles)


def text_player_set(
    snapshot: ConversationSnapshot, token_filter: str, explained_roles: Collection[str]
) -> PlayerSet:
    """Return one player per whitespace word of messages of `explained_roles` that `token_filter` lets pass.

    Other text stays present in every coalition. Ids are the library's `tokens` ids:
    `{snapshot_id}:{turn}:{message}:{word}`.
    """
    ids: list[str] = []
    spans: list[PlayerSpan] = []
    message_index = 0
    for turn_index, turn in enumerate(snapshot.turns):
        for local_index, message in enumerate(turn.messages):
            if message.role.value in explained_roles:
                for number, (start, end) in enumerate(player_spans(message.text, token_filter)):
                    ids.append(f"{snapshot.snapshot_id}:{turn_index}:{local_index}:{number}")
                    spans.append(
                        PlayerSpan(
                            message_index=message_index,
                            start=start,
                            end=end,
                            text=message.text[start:end],
                            speaker=message.speaker,
                        )
                    )
            message_index += 1
    if not spans:
        raise RowError("no_players", "the prompt has no word that could be a player")
    return PlayerSet(player_ids=tuple(ids), spans=tuple(spans))
