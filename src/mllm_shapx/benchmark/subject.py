"""The subject of a benchmark: a config's model, and a game for each row that the model can answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.config.vocabulary import ShapleyType
from mllm_shapx.data.conversations import Row, load_row
from mllm_shapx.data.selection import select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import RowError, UsageError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import decoding
from mllm_shapx.models.base import Model
from mllm_shapx.models.registry import load_model, model_identity
from mllm_shapx.planning.runs import Budget, RunSpec
from mllm_shapx.planning.sweep import expand, player_rule


@dataclass(frozen=True, slots=True)
class RowRun:
    """One row explained by one run."""

    row: Row
    run: RunSpec
    num_players: int

    @property
    def coalitions(self) -> int:
        """Return the number of coalitions of the run."""
        return self.run.coalitions(self.num_players)

    def limited_to(self, coalitions: int) -> "RowRun":
        """Return the game with at most about `coalitions` coalitions; exact if these suffice."""
        if 1 << self.num_players <= coalitions:
            return replace(self, run=_as(self.run, "exact", Budget("all")))
        budget = Budget("num_samples", max(coalitions, 1))
        return replace(self, run=_as(self.run, "limited_mc", budget))

    def smallest(self) -> "RowRun":
        """Return a game of two coalitions on the same row."""
        return replace(self, run=_as(self.run, "standard_mc", Budget("num_samples", 2)))


def take(games: Sequence[RowRun], coalitions: float, most: int) -> list[RowRun]:
    """Return games until they have `coalitions` together, or all; each has at most about `most`."""
    taken: list[RowRun] = []
    for game in games:
        taken.append(game.limited_to(most))
        coalitions -= taken[-1].coalitions
        if coalitions <= 0:
            break
    return taken


class Subject:
    """A config's runs and rows, and its model's location.

    Raises:
        UsageError: For all faults that the user can fix.
    """

    def __init__(self, loaded: LoadedConfig) -> None:
        settings = loaded.experiment_set
        if settings.connector == CONNECTOR:
            raise UsageError(
                f"{loaded.path}: bench measures models that are loaded here, and this one is behind a "
                "server; `mllm-shapx run --max-samples 2` shows its answers per second"
            )
        self.sweep = expand(settings, str(loaded.path)).runs
        answering = [run for run in self.sweep if run.shap.reads != "likelihoods"]
        if not answering:
            raise UsageError(
                f"{loaded.path}: bench measures how fast coalitions are answered, and this config has none "
                f'answered: "{self.sweep[0].shap.value_function}" reads the likelihood of a given text. Give '
                'bench a copy of the config with a similarity in "shap"'
            )
        self.run = _as(answering[0], "exact", Budget("all"))
        """Exact explanation with the settings of the sweep's first run that generates answers."""
        self._table = open_table(settings.dataset, loaded.path)
        rule = player_rule(settings, loaded.path)
        self._rows = select_rows(
            self._table, settings.dataset, settings.selection, settings.modality, rule
        ).rows
        self.model_path, self._revision = model_identity(self.run.model_settings, loaded.path)
        """The model's directory, None for a hub id; and its digest or hub commit."""
        self._config_path = loaded.path

    def load_model(self) -> Model:
        """Load the config's model.

        Raises:
            ModelError: When it cannot be loaded.
        """
        return load_model(self.run.model_settings, self.model_path, self._revision, self._config_path)

    def games(self, model: Model) -> Iterator[RowRun]:
        """Yield the exact game of each row that `model` can answer, in selection order.

        Raises:
            UsageError: When there is none.
        """
        refused: RowError | None = None
        found = False
        for row_index in self._rows:
            try:
                row = load_row(self._table, row_index, self.run.dataset, self.run.modality)
                opened = open_row(row, self.run)
                model.encode(opened.snapshot, decoding(self.run))
            except RowError as error:
                refused = error
                continue
            found = True
            yield RowRun(row, self.run, opened.players.num_players)
        if not found:
            raise UsageError(f"none of the {len(self._rows)} selected row(s) can be explained: {refused}")


def _as(run: RunSpec, explainer_type: ShapleyType, budget: Budget) -> RunSpec:
    """Return a run like `run` that evaluates so many coalitions and measures nothing else."""
    return replace(
        run,
        name="bench",
        explainer_type=explainer_type,
        budget=budget,
        hierarchical=None,
        stop_when=None,
        faithfulness=None,
        interactions=None,
    )
