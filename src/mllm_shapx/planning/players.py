"""Players of each row, under the config's token filter and under those that variants set themselves."""

from collections.abc import Mapping


class PlayerCounts(dict[int, int]):
    """Row index -> players under the config's token filter.

    Args:
        counts: These.
        others: The same under other token filters, by the filter's name.
    """

    def __init__(self, counts: Mapping[int, int], others: Mapping[str, Mapping[int, int]]) -> None:
        super().__init__(counts)
        self.others = dict(others)


def players_under(players: Mapping[int, int] | None, token_filter: str) -> Mapping[int, int] | None:
    """Return the players of each row under a run's token filter; None where they are not known."""
    if isinstance(players, PlayerCounts):
        return players.others.get(token_filter, players)
    return players
