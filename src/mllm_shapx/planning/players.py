"""The rules that split a prompt's text into players, and the players of each row under each rule."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mllm_shapx.config.models import ChatConfig
from mllm_shapx.config.scoring import ShapConfig
from mllm_shapx.config.sources import TokenizerSource
from mllm_shapx.config.vocabulary import PlayerKind, TokenFilter, context_roles


@dataclass(frozen=True, slots=True)
class PlayerRule:
    """Selects the pieces of a prompt's text that are players; all other text is always present."""

    token_filter: TokenFilter = "exclude_punctuation"  # noqa: S105 -- no password
    kind: PlayerKind = "words"
    kept_words: tuple[str, ...] = ()
    """Pieces that are not players, casefolded and without surrounding punctuation."""
    roles: tuple[str, ...] = ("user",)
    """Roles whose messages contain players."""
    system_prompt: str = ""
    """The text of the system message, if `roles` contains its role."""
    tokenizer: TokenizerSource | None = None
    """Source of token players; None for other kinds."""

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
    """Return a piece in the form of `kept_words`: casefolded, without surrounding punctuation and space."""
    letters = [place for place, character in enumerate(piece) if character.isalnum()]
    return (piece[letters[0] : letters[-1] + 1] if letters else piece.strip()).casefold()


class PlayerCounts(dict[int, int]):
    """Row index -> players under the config's rule.

    Args:
        counts: Row index -> players.
        others: The same under the variants' own rules.
    """

    def __init__(self, counts: Mapping[int, int], others: Mapping[PlayerRule, Mapping[int, int]]) -> None:
        super().__init__(counts)
        self.others = dict(others)


def players_under(players: Mapping[int, int] | None, rule: PlayerRule) -> Mapping[int, int] | None:
    """Return the players of each row under a run's rule; None when unknown."""
    if isinstance(players, PlayerCounts):
        return players.others.get(rule, players)
    return players
