"""The players of written messages."""

from collections.abc import Iterator

from mllm_shap import ConversationSnapshot, Message, PlayerSet, PlayerSpan

from mllm_shapx.data.tokens import player_spans
from mllm_shapx.errors import RowError
from mllm_shapx.planning.players import PlayerRule


def text_player_set(snapshot: ConversationSnapshot, rule: PlayerRule) -> PlayerSet:
    """Return the players under `rule` in the messages of its roles.

    Other text is present in every coalition. Ids have the library's form:
    `{snapshot_id}:{turn}:{message}:{piece}`.

    Raises:
        RowError: `no_players` when there is none.
    """
    players = [
        (f"{prefix}:{number}", span)
        for index, prefix, message in messages_of(snapshot)
        if message.role.value in rule.roles
        for number, span in enumerate(text_players(message, index, rule))
    ]
    if not players:
        raise RowError(
            "no_players", f"the prompt has no {rule.kind.removesuffix('s')} that could be a player"
        )
    ids, spans = zip(*players, strict=True)
    return PlayerSet(player_ids=ids, spans=spans)


def messages_of(snapshot: ConversationSnapshot) -> Iterator[tuple[int, str, Message]]:
    """Yield (index in conversation order, prefix of its players' ids, message)."""
    index = 0
    for turn_index, turn in enumerate(snapshot.turns):
        for local_index, message in enumerate(turn.messages):
            yield index, f"{snapshot.snapshot_id}:{turn_index}:{local_index}", message
            index += 1


def text_players(message: Message, message_index: int, rule: PlayerRule) -> list[PlayerSpan]:
    """Return the players under `rule` in a written message."""
    return [
        PlayerSpan(
            message_index=message_index,
            start=start,
            end=end,
            text=message.text[start:end],
            speaker=message.speaker,
        )
        for start, end in player_spans(message.text, rule)
    ]
