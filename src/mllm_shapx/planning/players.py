"""What makes a player of a prompt's text, and how many players each row has under each such rule."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mllm_shapx.config.models import ChatConfig
from mllm_shapx.config.scoring import ShapConfig
from mllm_shapx.config.sources import TokenizerSource
from mllm_shapx.config.vocabulary import PlayerKind, TokenFilter, context_roles


@dataclass(frozen=True, slots=True)
class PlayerRule:
    """Which pieces of the text of a prompt are players; all other text is always present."""

    token_filter: TokenFilter = "exclude_punctuation"  # noqa: S105 -- no password
    kind: PlayerKind = "words"
    kept_words: tuple[str, ...] = ()
    """Pieces that are no players, casefolded and without punctuation around them."""
    roles: tuple[str, ...] = ("user",)
    """Roles whose messages hold players."""
    system_prompt: str = ""
    """The text of the system message, where its role is one of `roles`."""
    tokenizer: TokenizerSource | None = None
    """Where the tokens come from; None for any other kind."""

    @classmethod
    def of(cls, shap: ShapConfig, chat: ChatConfig, tokenizer: TokenizerSource | None) -> Self:
        """Return the rule of a run's settings."""
        keep = shap.keep
        context = context_roles(chat.system_roles_setup) | set(() if keep is None else keep.roles)
        roles = tuple(role for role in ("system", "user", "assistant") if role not in context)
        return cls(
            token_filter=shap.token_filter,
            kind=shap.players,
            kept_words=() if keep is None else tuple(sorted(map(bare, keep.words))),
            roles=roles,
            system_prompt=chat.system_prompt if "system" in roles else "",
            tokenizer=tokenizer if shap.players == "tokens" else None,
        )


def bare(piece: str) -> str:
    """Return a piece as words to keep are compared: casefolded, without punctuation and space around it."""
    letters = [place for place, character in enumerate(piece) if character.isalnum()]
    return (piece[letters[0] : letters[-1] + 1] if letters else piece.strip()).casefold()


class PlayerCounts(dict[int, int]):
    """Row index -> players under the config's rule.

    Args:
        counts: These.
        others: The same under the rules that variants set themselves.
    """

    def __init__(self, counts: Mapping[int, int], others: Mapping[PlayerRule, Mapping[int, int]]) -> None:
        super().__init__(counts)
        self.others = dict(others)


def players_under(players: Mapping[int, int] | None, rule: PlayerRule) -> Mapping[int, int] | None:
    """Return the players of each row under a run's rule; None where they are not known."""
    if isinstance(players, PlayerCounts):
        return players.others.get(rule, players)
    return players
