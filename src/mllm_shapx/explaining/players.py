"""The players of a row: what can be present in or absent from its prompt."""

from mllm_shap import ConversationSnapshot, PlayerSet, PlayerSpan

from mllm_shapx.data.tokens import player_spans
from mllm_shapx.errors import RowError
from mllm_shapx.planning.players import PlayerRule
from mllm_shapx.planning.runs import RunSpec


def player_set(snapshot: ConversationSnapshot, run: RunSpec) -> PlayerSet:
    """Return the players of `snapshot`, in conversation order: pieces of text and stretches of audio.

    Raises:
        RowError: `no_players` when the prompt holds none.
    """
    if run.modality.has_audio_input:
        from mllm_shapx.explaining.audio_players import audio_player_set

        return audio_player_set(snapshot, run.audio_segmentation, run.player_rule)
    return text_player_set(snapshot, run.player_rule)


def text_player_set(snapshot: ConversationSnapshot, rule: PlayerRule) -> PlayerSet:
    """Return the players that `rule` makes of the messages of its roles.

    Other text stays present in every coalition. Ids are of the library's form:
    `{snapshot_id}:{turn}:{message}:{piece}`.

    Raises:
        RowError: `no_players` when there is none.
    """
    ids: list[str] = []
    spans: list[PlayerSpan] = []
    message_index = 0
    for turn_index, turn in enumerate(snapshot.turns):
        for local_index, message in enumerate(turn.messages):
            if message.role.value in rule.roles:
                for number, (start, end) in enumerate(player_spans(message.text, rule)):
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
        raise RowError(
            "no_players", f"the prompt has no {rule.kind.removesuffix('s')} that could be a player"
        )
    return PlayerSet(player_ids=tuple(ids), spans=tuple(spans))
