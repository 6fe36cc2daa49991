"""Samples that were made with other players than their rows have now must not be mixed with new ones."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from mllm_shapx.errors import OutputError
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.summary import SampleMetrics


class OldPlayers:
    """Finds the finished samples whose number of players is not the selection's.

    Which words are players depends on this package's version as well as on the config. Between two rules
    one of which leaves out more words than the other, equal numbers mean equal players.

    Args:
        players: Players per selected row; None where they are not known before a row is read.
    """

    def __init__(self, players: Mapping[int, int] | None) -> None:
        self._players = players
        self._found: defaultdict[str, set[int]] = defaultdict(set)

    def of_run(self, run: RunSpec) -> Callable[[SampleMetrics], None]:
        """Return what takes the samples of a run."""
        players = players_under(self._players, run.player_rule) or {}

        def take(sample: SampleMetrics) -> None:
            if sample.num_players != players.get(sample.row_index, sample.num_players):
                self._found[run.name].add(sample.row_index)

        return take

    def refuse(self, output_uri: str, redone: Mapping[str, Collection[int]]) -> None:
        """Refuse to go on where there are such samples.

        Args:
            output_uri: The study's directory, for the message.
            redone: Run -> rows that are explained again, whose samples do not count.

        Raises:
            OutputError: With their number in each run.
        """
        counts = {name: len(rows.difference(redone.get(name, ()))) for name, rows in self._found.items()}
        found = {name: count for name, count in counts.items() if count}
        if found:
            listed = "\n".join(f"  - {name}: {count:,} sample(s)" for name, count in found.items())
            raise OutputError(
                f"{output_uri} holds samples whose rows have other players now, because the rule for words "
                "without letters, numbers and symbols (shap.token_filter) has changed since; "
                f"resuming would mix them:\n{listed}\n"
                "Name another experiment_set_id, or give --overwrite: it moves the old samples aside, and "
                "takes stored answers again where the players are the same"
            )
