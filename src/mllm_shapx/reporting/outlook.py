"""Warnings before a study starts: rows that cannot be explained, and games that take very long."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from mllm_shapx.errors import DatasetError
from mllm_shapx.planning.hopeless import hopeless_runs, without_players
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import expected_answers, runs_by_key
from mllm_shapx.records.pace import Pace, read_pace
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.timing import count_workers, format_duration

_LARGE_LOG2 = 20
"""A game of 2^20 coalitions takes hours on most machines."""
_NOMINAL_PER_SECOND = 100.0
"""Answers per second for an estimate without a measurement."""


class Outlook:
    """The rows that runs cannot explain, and those that take very long.

    Args:
        uri: The experiment set's directory, for the pace that was measured there.
        runs: The sweep.
        rows: Row indices in selection order.
        players: Players per row; no warnings where they are not known.
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
        """Return a warning of games of 2^20 coalitions and more, with their time; empty without such."""
        answers = defaultdict[str, float](float)  # by cost key
        rows, names = set[int](), dict[str, None]()
        for sharing in runs_by_key(self._runs).values():
            of_rows = players_under(self._players, sharing[0].player_rule) or {}
            by_count = defaultdict[int, list[int]](list)
            for row in self._rows:
                if of_rows.get(row, 0) >= _LARGE_LOG2:
                    by_count[of_rows[row]].append(row)
            for count, members in by_count.items():
                possible = [run for run in sharing if not run.is_hopeless(count)]
                large = [run.name for run in possible if run.coalitions(count) >= 1 << _LARGE_LOG2]
                if large:
                    answers[sharing[0].cost_key] += expected_answers(possible, count) * len(members)
                    rows.update(members)
                    names.update(dict.fromkeys(large))
        if not names:
            return []
        first, *more = names
        others = f" and {len(more)} more run(s)" if more else ""
        text = (
            f"{first}{others}: {len(rows):,} row(s) of {len(self._rows):,} have games of 2^{_LARGE_LOG2} = "
            f"{1 << _LARGE_LOG2:,} coalitions or more; they take {sum(answers.values()):,.0f} answers, "
            f"{_time(answers, read_pace(open_storage(self._uri)))}. selection.max_prompt_tokens bounds the "
            "players of a row"
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
            raise DatasetError("\n".join(f"no row can be explained by {each.to_text()}" for each in useless))


def _time(answers: Mapping[str, float], pace: Pace | None) -> str:
    """Return how long answers take, in words; they are counted by cost key."""
    if pace is None or any(key not in pace.seconds for key in answers):
        return (
            f"{format_duration(sum(answers.values()) / _NOMINAL_PER_SECOND)} at {_NOMINAL_PER_SECOND:.0f} a "
            "second (`mllm-shapx bench` measures how many a second it is here)"
        )
    seconds = sum(count * pace.seconds[key] for key, count in answers.items()) / pace.workers
    return f"about {format_duration(seconds)} on {count_workers(pace.workers)} at the pace measured here"
