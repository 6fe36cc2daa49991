"""What a study cannot do, or takes very long for: said before anything is loaded."""

import math
from collections.abc import Iterator, Mapping, Sequence

from mllm_shapx.errors import DatasetError
from mllm_shapx.planning.hopeless import Hopeless, hopeless_runs, without_players
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import expected_answers, runs_by_key
from mllm_shapx.records.pace import Pace, read_pace
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.timing import format_duration

LARGE_LOG2 = 20
"""A game of 2^20 coalitions is worth a warning: it takes hours on most machines."""
NOMINAL_PER_SECOND = 100.0
"""Answers per second for which a time is stated where none was measured."""


class Outlook:
    """What `runs` cannot do on `rows`, and what takes very long.

    Args:
        uri: The experiment set's directory, for the pace that was measured there.
        runs: The sweep.
        rows: Row indices in selection order.
        players: Players per row; nothing is said where they are not known.
    """

    def __init__(
        self, uri: str, runs: Sequence[RunSpec], rows: Sequence[int], players: Mapping[int, int] | None
    ) -> None:
        self._uri = uri
        self._runs = runs
        self._rows = rows
        self._players = players
        self._hopeless = hopeless_runs(runs, rows, players)

    def warnings(self) -> list[str]:
        """Return what the user should know before the start."""
        nobody = without_players(self._rows, self._players)
        return [*nobody, *(each.to_text() for each in self._hopeless), *self.large_games()]

    def large_games(self) -> list[str]:
        """Return a warning of games of 2^20 coalitions and more, with what they take; none without such."""
        groups = [
            (sharing, large)
            for sharing in runs_by_key(self._runs).values()
            if (large := list(_large(sharing, self._rows, self._players)))
        ]
        if not groups:
            return []
        pace = read_pace(open_storage(self._uri))
        answers, seconds = 0.0, 0.0
        rows, names = set[int](), dict[str, None]()
        for sharing, large in groups:
            each = math.nan if pace is None else pace.seconds.get(sharing[0].cost_key, math.nan)
            for row, count, runs in large:
                asked = expected_answers([run for run in sharing if not run.is_hopeless(count)], count)
                answers += asked
                seconds += asked * each
                rows.add(row)
                names.update(dict.fromkeys(run.name for run in runs))
        first, *more = names
        others = f" and {len(more)} more run(s)" if more else ""
        text = (
            f"{first}{others}: {len(rows):,} row(s) of {len(self._rows):,} have games of 2^{LARGE_LOG2} = "
            f"{1 << LARGE_LOG2:,} coalitions or more; they take {answers:,.0f} answers, "
            f"{_time(answers, seconds, pace)}. selection.max_prompt_tokens bounds the players of a row"
        )
        return [text]

    def refuse_hopeless(self, *, all_runs: bool) -> None:
        """Refuse runs that can explain none of the rows.

        Args:
            all_runs: Refuse only where no run can explain anything.

        Raises:
            DatasetError: With the bound on the players for each such run.
        """
        if self._players is not None and not any(self._players.get(row, 1) for row in self._rows):
            raise DatasetError(f"no row can be explained: {without_players(self._rows, self._players)[0]}")
        useless = [each for each in self._hopeless if each.rows == each.rows_in_all]
        if useless and (len(useless) == len(self._runs) or not all_runs):
            raise DatasetError("\n".join(map(_refusal, useless)))


def _refusal(useless: Hopeless) -> str:
    return f"no row can be explained by {useless.to_text()}"


def _large(
    sharing: Sequence[RunSpec], rows: Sequence[int], players: Mapping[int, int] | None
) -> Iterator[tuple[int, int, list[RunSpec]]]:
    """Yield each row with a large game, its players, and the runs that play one."""
    of_rows = players_under(players, sharing[0].player_rule) or {}
    by_count: dict[int, list[RunSpec]] = {}
    for row in rows:
        count = of_rows.get(row, 0)
        if count < LARGE_LOG2:
            continue
        if count not in by_count:
            by_count[count] = [
                run
                for run in sharing
                if not run.is_hopeless(count) and run.coalitions(count) >= 1 << LARGE_LOG2
            ]
        if by_count[count]:
            yield row, count, by_count[count]


def _time(answers: float, seconds: float, pace: Pace | None) -> str:
    if pace is None or math.isnan(seconds):
        return (
            f"{format_duration(answers / NOMINAL_PER_SECOND)} at {NOMINAL_PER_SECOND:.0f} a second "
            "(`mllm-shapx bench` measures how many a second it is here)"
        )
    workers = "one worker" if pace.workers == 1 else f"{pace.workers} workers"
    return f"about {format_duration(seconds / pace.workers)} on {workers} at the pace measured here"
