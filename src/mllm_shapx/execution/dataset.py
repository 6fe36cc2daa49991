"""A study's dataset: its files, and the samples that no longer match its rows."""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.config.loading import LoadedConfig, resolve_path
from mllm_shapx.config.models import DatasetConfig, ExperimentSet, SelectionConfig
from mllm_shapx.data.columns import resolve_columns
from mllm_shapx.data.digests import Changes, compare_samples
from mllm_shapx.data.selection import Selection, select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.data.table import Table
from mllm_shapx.errors import OutputError
from mllm_shapx.models.control_tokens import control_token_warnings
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import Sweep, player_rule
from mllm_shapx.records.results import SampleFile
from mllm_shapx.records.runs import RunInspection, RunRecords
from mllm_shapx.records.spec import DATASET_COMMIT, RESULT_SETTINGS
from mllm_shapx.records.storage import Storage, open_storage
from mllm_shapx.records.store import CoalitionStore

if TYPE_CHECKING:
    from mllm_shapx.execution.messages import Study  # at run time it would import mllm_shap, which is slow


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """Samples of rows that have changed in the dataset since."""

    samples: Mapping[str, Sequence[int]]
    """Run -> rows."""
    changes: Changes


class OldPlayers:
    """Finds the samples whose rows now have other players.

    Which words are players depends on the config and on this package's version. One version's rule leaves
    out more words than the other's, so equal numbers mean equal players.

    Args:
        players: Players per selected row; None if they are unknown until a row is read.
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
        """Refuse to continue if there are such samples.

        Args:
            output_uri: The study's directory, for the message.
            redone: Run -> rows to explain again; their samples do not count.

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
    """Return the dataset of a config and its selected rows, with warnings about their special tokens.

    Args:
        loaded: The config.
        sweep: Its runs.
        dataset: The config's dataset, see `pinned`.
        selection: Settings of the selection.

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
    if dataset.is_local:
        return dataset
    storage = open_storage(output_uri)
    commits = {_commit_in(RunRecords(storage, run.name)) for run in runs} - {None}
    return _at(dataset, commits.pop() if len(commits) == 1 else None)


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


def refuse_changed_rows(study: "Study") -> None:
    """Refuse a directory with samples of rows that have changed since. Reads only.

    Raises:
        OutputError: With the number of rows and the fix.
    """
    storage = open_storage(study.output_uri)
    changed, changes = _changed_samples(
        study, {run.name: RunRecords(storage, run.name).read_made_from() for run in study.runs}
    )
    if changed:
        raise _refusal(study, changed, changes)


def find_changed_rows(
    study: "Study", inspections: Mapping[str, RunInspection], *, accept: bool
) -> ChangedRows:
    """Compare every sample with its row in the dataset. Reads only.

    Args:
        study: The study.
        inspections: Inspection of each run's directory.
        accept: Whether samples of changed rows may be replaced.

    Raises:
        OutputError: When rows have changed and `accept` is false.
    """
    changed, changes = _changed_samples(study, {name: one.made_from for name, one in inspections.items()})
    if changed and not accept:
        raise _refusal(study, changed, changes)
    return ChangedRows(changed, changes)


def make_again(
    study: "Study", inspections: Mapping[str, RunInspection], found: ChangedRows
) -> tuple[dict[str, RunInspection], list[str]]:
    """Set samples of changed rows aside; remove failures that belong to another dataset.

    Returns:
        The inspections without them, and notes.
    """
    storage = open_storage(study.output_uri)
    left, notes = dict(inspections), []
    if found.samples:
        left = _move_aside(storage, inspections, found.samples)
        notes += _notes_of(found.changes, found.samples)
    for name, one in left.items():
        if one.failed and study.retry_rows is None and _has_other_dataset(study, RunRecords(storage, name)):
            for row in one.failed:
                RunRecords(storage, name).clear_failure(row)
            notes.append(
                f"{name}: the dataset has changed since {len(one.failed)} row(s) failed; they are tried again"
            )
            left[name] = replace(one, failed=frozenset(), attempts={})
    return left, notes


def _has_other_dataset(study: "Study", records: RunRecords) -> bool:
    """Return whether a run's `spec.json` has the hash of another local dataset."""
    before = (records.read_spec() or {}).get(DATASET_COMMIT)
    return before is not None and study.dataset_commit is None and before != study.dataset_content


def _refusal(study: "Study", changed: Mapping[str, Sequence[int]], changes: Changes) -> OutputError:
    count = sum(map(len, changed.values()))
    return OutputError(
        f"{study.output_uri}: {changes.in_words()}. {count} sample(s) show the rows as they were; going on "
        "would mix them with the rows as they are. Put the dataset back, name another experiment_set_id, or "
        "give `run --resume --accept-changed-rows` to explain these rows again and no others (their samples "
        "are moved aside)"
    )


def _changed_samples(
    study: "Study", samples: Mapping[str, Mapping[int, str]]
) -> tuple[dict[str, list[int]], Changes]:
    """Return run -> changed rows with samples, and the changes."""
    # A commit on the hub does not change.
    if study.dataset_commit is not None or not any(samples.values()):
        return {}, Changes((), {})
    table = open_study_table(study)
    return compare_samples(table, study.dataset, study.runs[0].modality, samples)


def _move_aside(
    storage: Storage, inspections: Mapping[str, RunInspection], changed: Mapping[str, Sequence[int]]
) -> dict[str, RunInspection]:
    # The answers first: after an interruption, the samples still show that their rows have changed.
    CoalitionStore(storage).set_aside({row for rows in changed.values() for row in rows})
    for name, rows in changed.items():
        RunRecords(storage, name).set_rows_aside(rows)
    return {name: found.without(changed.get(name, ())) for name, found in inspections.items()}


def _notes_of(changes: Changes, changed: Mapping[str, Sequence[int]]) -> list[str]:
    runs = ", ".join(f"{name} ({len(rows)})" for name, rows in changed.items())
    return [f"{changes.in_words()}; their samples are moved aside and made again: {runs}"]


def _at(dataset: DatasetConfig, commit: str | None) -> DatasetConfig:
    return dataset if commit is None else dataset.model_copy(update={"revision": commit})


def _commit_in(records: RunRecords) -> str | None:
    try:
        spec = records.read_spec()
    except ValueError:
        return None
    settings = (spec or {}).get(RESULT_SETTINGS)
    commit = settings.get("dataset_commit") if isinstance(settings, dict) else None
    return commit if isinstance(commit, str) else None
