"""The model's answer without a row's most important player, from the stored answers of a study."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from mllm_shapx.config.models import ConnectorKwargs
from mllm_shapx.errors import StorageError
from mllm_shapx.planning.runs import settings_digest
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.reporting.agreement import most_important
from mllm_shapx.reporting.reading import RunFiles

_DTYPES: tuple[str, ...] = get_args(ConnectorKwargs.model_fields["dtype"].annotation)
"""Words of a config. A stored answer's settings have the resulting dtype."""


class StoredAnswersOfRuns:
    """Finds the stored answers of samples; reads only."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        self._runs = runs
        self._stores = {run.records.storage.uri: CoalitionStore(run.records.storage) for run in runs}
        self._keys = {uri: _keys(store) for uri, store in self._stores.items()}

    def without_most_important(self, row: int, samples: Sequence[SampleResult | None]) -> list[str | None]:
        """Return the answer to a row's prompt without each run's most important player.

        Args:
            row: The row's index.
            samples: Its samples, one per run.

        Returns:
            One text per run; None where it is not stored, or the answers belong to another prompt or model.
        """
        wanted = [None if sample is None else _masks(sample) for sample in samples]
        masks = frozenset(mask for pair in wanted if pair is not None for mask in pair)

        @functools.cache
        def stored(uri: str, key: str) -> tuple[dict[int, str], int]:
            return self._stores[uri].texts(row, key, masks)

        found: list[str | None] = []
        for run, sample, pair in zip(self._runs, samples, wanted, strict=True):
            answer = None
            uri, generation_key = run.records.storage.uri, run.spec.get("generation_key")
            if sample is not None and pair is not None and isinstance(generation_key, str):
                whole, part = pair
                for key in self._keys[uri].get(generation_key, ()):
                    texts, players = stored(uri, key)
                    if players in {0, sample.num_players} and texts.get(whole) == sample.response:
                        answer = texts.get(part)
            found.append(answer)
        return found


def _keys(store: CoalitionStore) -> dict[str, list[str]]:
    """Return a run's generation key -> the store's keys of it: one for each model version and dtype."""
    keys: dict[str, list[str]] = defaultdict(list)
    try:
        first = dict(sorted(((key, row) for row, key in store.places()), reverse=True))
    except StorageError:
        return keys
    for key, row in first.items():
        settings = store.settings(row, key)
        if settings is not None:
            # A run's generation key is made without the commit, and with the config's word for the dtype.
            asked = {name: value for name, value in settings.items() if name != "model_commit"}
            for dtype in _DTYPES:
                keys[settings_digest({**asked, "dtype": dtype})].append(key)
    return keys


def _masks(sample: SampleResult) -> tuple[int, int] | None:
    """Return the coalition of all players and that without the most important one; None where none is."""
    values = sample.player_values()
    if len(values) != sample.num_players or not any(values):
        return None
    whole = (1 << len(values)) - 1
    top = most_important([value or 0.0 for value in values])[0]
    return whole, whole ^ (1 << top)
