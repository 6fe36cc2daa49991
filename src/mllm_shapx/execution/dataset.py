"""A study's dataset: its files, and the samples that no longer match its rows."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.config.loading import LoadedConfig, resolve_path
from mllm_shapx.config.models import DatasetConfig, ExperimentSet, SelectionConfig
from mllm_shapx.data.columns import resolve_columns
from mllm_shapx.data.digests import Changes, compare_samples
from mllm_shapx.data.selection import Selection, select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.data.table import Table
from mllm_shapx.errors import DatasetError, ModelError, OutputError
from mllm_shapx.models.control_tokens import control_token_warnings
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import Sweep, player_rule
from mllm_shapx.records.results import SampleFile
from mllm_shapx.records.runs import RunInspection, RunRecords
from mllm_shapx.records.spec import DATASET_COMMIT, RESULT_SETTINGS
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore

if TYPE_CHECKING:
    from mllm_shapx.execution.messages import Study  # at run time it would import mllm_shap, which is slow


@contextlib.contextmanager
def naming(loaded: LoadedConfig) -> Iterator[None]:
    """Prefix errors of the dataset, the model and the output with the config's path."""
    try:
        yield
    except (DatasetError, ModelError, OutputError) as error:
        raise type(error)(f"{loaded.path}: {error}") from error


class OldPlayers:
    """Finds the samples whose rows now have other players.

    Which words are players depends on the config and on this package's version. One version's rule leaves
    out more words than the other's, so equal numbers mean equal players. `players` has the number of each
    selected row; None if they are unknown until a row is read.
    """

    def __init__(self, players: Mapping[int, int] | None) -> None:
        self._players = players
        self._found: defaultdict[str, set[int]] = defaultdict(set)

    def of_run(self, run: RunSpec) -> Callable[[SampleFile], None]:
        """Return a function that checks one sample of a run."""
        players = players_under(self._players, run.player_rule) or {}

        def take(sample: SampleFile) -> None:
            if sample.num_players != players.get(sample.row_index, sample.num_players):
                self._found[run.name].add(sample.row_index)

        return take

    def refuse(self, output_uri: str, redone: Mapping[str, Collection[int]]) -> None:
        """Refuse to continue if there are such samples, besides those of `redone` (run -> rows).

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


def open_study_table(study: "Study") -> Table:
    """Open the dataset at the commit of the row selection.

    Raises:
        DatasetError: As `open_table`.
    """
    return open_table(_at(study.dataset, study.dataset_commit), study.config_path)


def open_selection(
    loaded: LoadedConfig, sweep: Sweep, dataset: DatasetConfig, selection: SelectionConfig
) -> tuple[Table, Selection]:
    """Return the table of `dataset`, see `pinned`, and its selected rows, with warnings on special tokens.

    Raises:
        DatasetError: When the dataset cannot be used.
    """
    settings = loaded.experiment_set
    table = open_table(dataset, loaded.path)
    chosen = select_rows(
        table,
        dataset,
        selection,
        settings.modality,
        player_rule(settings, loaded.path),
        other_rules=[run.player_rule for run in sweep.runs],
    )
    first = sweep.runs[0]
    more = control_token_warnings(
        first.model_settings,
        loaded.path,
        table,
        chosen.rows,
        dataset=first.dataset,
        modality=first.modality,
    )
    return table, replace(chosen, warnings=(*chosen.warnings, *more))


def pinned(dataset: DatasetConfig, output_uri: str, runs: Sequence[RunSpec]) -> DatasetConfig:
    """Return a hub dataset at the commit of the results in a directory.

    A branch may have moved since, but the study keeps its rows. A dataset without results and a local one
    are returned unchanged.
    """
    return dataset if dataset.is_local else _at(dataset, recorded_commit(output_uri, runs, "dataset_commit"))


def recorded_commit(output_uri: str, runs: Sequence[RunSpec], key: str) -> str | None:
    """Return the one value of `key` in the specs of a directory that have it; None without one."""
    storage = open_storage(output_uri)
    found = set()
    for run in runs:
        with contextlib.suppress(ValueError):  # opening the directory repairs or refuses a damaged file
            settings = (RunRecords(storage, run.name).read_spec() or {}).get(RESULT_SETTINGS)
            commit = settings.get(key) if isinstance(settings, dict) else None
            found |= {commit} if isinstance(commit, str) else set()
    return found.pop() if len(found) == 1 else None


def content_of(table: Table, settings: ExperimentSet) -> str | None:
    """Return a hash of a local dataset's content in the columns in use, without recordings.

    Recordings may be large; each row's digest covers its own.
    """
    columns = resolve_columns(table, settings.dataset, settings.modality)
    selection = settings.selection
    read = {name for name in columns.names if name != columns.audio}
    read |= {row_filter.column for row_filter in selection.filters}
    if selection.balanced_token_counts is not None:
        read.add(settings.dataset.column_mapping.token_count or "token_count")
    return table.content(sorted(read))


def dataset_path(dataset: DatasetConfig, config_path: Path) -> str | None:
    """Return the absolute path of a local dataset, for commands without a config; None for the hub."""
    if not dataset.is_local or not dataset.path:
        return None
    return os.path.abspath(resolve_path(dataset.path, config_path))  # noqa: PTH100 -- keeps symbolic links


def changed_rows(
    study: "Study", samples: Mapping[str, Mapping[int, str]], *, accept: bool
) -> tuple[Mapping[str, Sequence[int]], Changes]:
    """Compare samples (run -> row -> what the sample was made from) with the dataset. Reads only.

    Returns:
        Run -> changed rows with samples, and the changes.

    Raises:
        OutputError: When rows have changed and `accept` is false.
    """
    # A commit on the hub does not change.
    if study.dataset_commit is not None or not any(samples.values()):
        return {}, Changes((), {})
    table = open_study_table(study)
    changed, changes = compare_samples(table, study.dataset, study.runs[0].modality, samples)
    if changed and not accept:
        raise OutputError(
            f"{study.output_uri}: {changes.in_words()}. {sum(map(len, changed.values()))} sample(s) show the "
            "rows as they were; going on would mix them with the rows as they are. Put the dataset back, "
            "name another experiment_set_id, or give `run --resume --accept-changed-rows` to explain these "
            "rows again and no others (their samples are moved aside)"
        )
    return changed, changes


def make_again(
    study: "Study",
    inspections: Mapping[str, RunInspection],
    changed: Mapping[str, Sequence[int]],
    changes: Changes,
) -> tuple[dict[str, RunInspection], list[str]]:
    """Set samples of changed rows aside; remove failures that belong to another dataset.

    Returns:
        The inspections without them, and notes.
    """
    storage = open_storage(study.output_uri)
    left, notes = dict(inspections), []
    if changed:
        # The answers first: after an interruption, the samples still show that their rows have changed.
        CoalitionStore(storage).set_aside({row for rows in changed.values() for row in rows})
        for name, rows in changed.items():
            RunRecords(storage, name).set_rows_aside(rows)
            left[name] = inspections[name].without(rows)
        runs = ", ".join(f"{name} ({len(rows)})" for name, rows in changed.items())
        notes.append(f"{changes.in_words()}; their samples are moved aside and made again: {runs}")
    for name, one in left.items():
        records = RunRecords(storage, name)
        if one.failed and study.options.retry_rows is None and _has_other_dataset(study, records):
            for row in one.failed:
                records.clear_failure(row)
            notes.append(
                f"{name}: the dataset has changed since {len(one.failed)} row(s) failed; they are tried again"
            )
            left[name] = replace(one, failed=frozenset(), attempts={})
    return left, notes


def _has_other_dataset(study: "Study", records: RunRecords) -> bool:
    """Return whether a run's `spec.json` has the hash of another local dataset."""
    before = (records.read_spec() or {}).get(DATASET_COMMIT)
    return before is not None and study.dataset_commit is None and before != study.dataset_content


def _at(dataset: DatasetConfig, commit: str | None) -> DatasetConfig:
    return dataset if commit is None else dataset.model_copy(update={"revision": commit})
