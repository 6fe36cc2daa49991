"""What the model says without a row's most important player, from the answers that a study keeps."""

from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from mllm_shapx.config.models import ConnectorKwargs
from mllm_shapx.errors import StorageError
from mllm_shapx.planning.runs import settings_digest
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.storage import Storage
from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.reporting.agreement import most_important
from mllm_shapx.reporting.reading import RunFiles

_DTYPES: tuple[str, ...] = get_args(ConnectorKwargs.model_fields["dtype"].annotation)
"""What a config may say; a stored answer's settings name the dtype that it became."""


class StoredAnswersOfRuns:
    """Finds the stored answers of samples; reads only."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        self._runs = runs
        self._stores = {run.records.storage.uri: _Store(run.records.storage) for run in runs}

    def without_most_important(self, row: int, samples: Sequence[SampleResult | None]) -> list[str | None]:
        """Return the answer to a row's prompt without each run's most important player.

        Args:
            row: The row's index.
            samples: Its samples, one per run.

        Returns:
            One text per run; None where it is not stored, or the answers belong to another prompt or model.
        """
        wanted = [None if sample is None else _masks(sample) for sample in samples]
        together = frozenset(mask for pair in wanted if pair is not None for mask in pair)
        stored: dict[tuple[str, str], dict[int, str]] = {}
        found: list[str | None] = []
        for run, sample, masks in zip(self._runs, samples, wanted, strict=True):
            answer = None
            if sample is not None and masks is not None:
                whole, part = masks
                store = self._stores[run.records.storage.uri]
                for key in store.keys_of(run):
                    place = (run.records.storage.uri, key)
                    if place not in stored:
                        stored[place] = store.answers(row, key, sample.num_players, together)
                    if stored[place].get(whole) == sample.response:
                        answer = stored[place].get(part)
            found.append(answer)
        return found


class _Store:
    """The answers of one experiment set."""

    def __init__(self, storage: Storage) -> None:
        self._store = CoalitionStore(storage)
        self._keys: dict[str, list[str]] = defaultdict(list)
        try:
            first = dict(sorted(((key, row) for row, key in self._store.places()), reverse=True))
        except StorageError:
            first = {}
        for key, row in first.items():
            settings = self._store.settings(row, key)
            if settings is not None:
                # A run's generation key covers no commit, and the dtype as the config says it.
                asked = {name: value for name, value in settings.items() if name != "model_commit"}
                for dtype in _DTYPES:
                    self._keys[settings_digest({**asked, "dtype": dtype})].append(key)

    def keys_of(self, run: RunFiles) -> Sequence[str]:
        """Return the store's keys of a run: one for each model version and dtype."""
        key = run.spec.get("generation_key")
        return self._keys.get(key, ()) if isinstance(key, str) else ()

    def answers(self, row: int, key: str, players: int, masks: frozenset[int]) -> dict[int, str]:
        """Return the texts of some coalitions of a row; nothing where its players are others."""
        texts, of_row = self._store.texts(row, key, masks)
        return texts if of_row in {0, players} else {}


def _masks(sample: SampleResult) -> tuple[int, int] | None:
    """Return the coalition of all players and that without the most important one; None where none is."""
    values = sample.player_values()
    if len(values) != sample.num_players or not any(values):
        return None
    whole = (1 << len(values)) - 1
    top = most_important([value or 0.0 for value in values])[0]
    return whole, whole ^ (1 << top)
