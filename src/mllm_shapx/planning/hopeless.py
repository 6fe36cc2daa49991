"""Finds rows that a run cannot explain, because a game would plan too many coalitions."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import MAX_LOG2_COALITIONS, RunSpec


@dataclass(frozen=True, slots=True)
class Hopeless:
    """The rows that a run cannot explain."""

    run: RunSpec
    rows: int
    """Rows with too many players, at least one."""
    rows_in_all: int
    most_players: int
    """Most players that a row may have."""

    def to_text(self) -> str:
        """Return the problem and the fix."""
        many = f"{self.rows:,} row(s) of {self.rows_in_all:,} have more than {self.most_players} players"
        other = (
            "or make ks and the budgets smaller"
            if self.run.hierarchical is not None
            else "or take a sampling explainer with num_samples or linear, or the hierarchical one"
        )
        return (
            f"{self.run.name}: {many} and will fail: a game would plan more than 2^{MAX_LOG2_COALITIONS} "
            f"coalitions; set selection.max_prompt_tokens to {self.most_players} or less, {other}"
        )


def hopeless_runs(
    runs: Sequence[RunSpec], rows: Sequence[int], players: Mapping[int, int] | None
) -> list[Hopeless]:
    """Return the runs that cannot explain some of `rows`; none when the players are unknown."""
    found = []
    for run in runs:
        of_rows = players_under(players, run.player_rule) or {}
        counts = [of_rows[row] for row in rows if row in of_rows]
        refused = [count for count in counts if run.is_hopeless(count)]
        if refused:
            found.append(Hopeless(run, len(refused), len(rows), _most_players(run, min(refused))))
    return found


def without_players(rows: Sequence[int], players: Mapping[int, int] | None) -> list[str]:
    """Return notes for the user on rows without players."""
    number = sum((players or {}).get(row) == 0 for row in rows)
    if not number:
        return []
    text = (
        f"{number:,} row(s) of {len(rows):,} have nothing that could be a player and will fail; "
        "selection.min_prompt_tokens 1 leaves them out"
    )
    return [text]


def _most_players(run: RunSpec, too_many: int) -> int:
    """Return the most players that a row may have, below `too_many`; coalitions grow with players."""
    return bisect_left(range(1, too_many), x=True, key=run.is_hopeless)
