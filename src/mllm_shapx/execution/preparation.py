"""Prepares a study: its rows, its model's version, and an output directory that matches the config.

Nothing is written before `open_output`, so a wrong config leaves no trace.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.config.paths import is_uri, real
from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.errors import OutputError, ServerAwayError, UsageError
from mllm_shapx.execution.answers import keys_in_use
from mllm_shapx.execution.dataset import (
    OldPlayers,
    changed_rows,
    content_of,
    make_again,
    open_selection,
    pinned,
    recorded_commit,
)
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.spec_content import (
    library_versions,
    refuse_other_settings,
    run_spec,
    usable_specs,
)
from mllm_shapx.explaining.value_models import value_model
from mllm_shapx.models.identity import MODEL_ID, Version, encoder_version
from mllm_shapx.models.registry import model_version
from mllm_shapx.models.server_budget import ServerLimits
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.environments import ENVIRONMENTS, MODEL, history
from mllm_shapx.records.layout import GENERATIONS, SHARDS
from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.runs import RunInspection, RunRecords
from mllm_shapx.records.shards import found_shards
from mllm_shapx.records.storage import Storage, join_uri, open_storage, write_json
from mllm_shapx.records.store import CoalitionStore, PruneResult
from mllm_shapx.reporting.reading import open_study
from mllm_shapx.tracking.tracker import placed_trackers

CONFIG = "config.json"
"""Copy of the config, bases merged in, next to the runs' folders. `retry` reads it."""
_SHOWN = 5
"""Runs that a message names."""


@dataclass(frozen=True)
class OpenOutput:
    """An output directory whose lock this process holds."""

    lock: OutputLock
    inspections: Mapping[str, RunInspection]
    specs: Mapping[str, dict[str, Any]]
    """Run -> content of its `spec.json`."""
    notes: tuple[str, ...]
    """Messages on repaired, moved and replaced files."""


def prepare(
    loaded: LoadedConfig, options: RunOptions, *, may_do_without_server: bool = False
) -> tuple[Study, tuple[str, ...]]:
    """Return the study of a config and warnings. Writes nothing.

    With `may_do_without_server` and with `options.resume`, the model behind an unreachable server is assumed
    to be the recorded one. Workers compare the model before its first answer.

    Raises:
        UsageError: For all faults that the user can fix.
    """
    experiment_set = loaded.experiment_set
    sweep = expand(experiment_set, str(loaded.path))
    output_uri = join_uri(experiment_set.output_root, experiment_set.experiment_set_id)
    if "://" not in output_uri:
        output_uri = str(real(Path(output_uri)))
    shard = options.shard
    if shard is not None:
        output_uri = join_uri(output_uri, shard.folder)
    dataset = experiment_set.dataset
    if options.resume:
        dataset = pinned(dataset, output_uri, sweep.runs)
    chosen = experiment_set.selection
    if options.max_samples is not None:
        chosen = chosen.model_copy(update={"max_samples": options.max_samples})
    table, selection = open_selection(loaded, sweep, dataset, chosen)
    rows = selection.rows if shard is None else shard.rows(selection.rows)
    if shard is not None and not rows:
        raise UsageError(
            f"{loaded.path}: --shard {shard.index}/{shard.count}: only {len(selection.rows)} row(s) are "
            "selected, so that this shard has none; make fewer shards"
        )
    encoders = {
        run.embedding: encoder_version(run.embedding, loaded.path)
        for run in sweep.runs
        if run.embedding is not None
    }
    runs = tuple(replace(run, value_model=value_model(run, loaded.path)) for run in sweep.runs)
    away: tuple[str, ...] = ()
    try:
        model_path, model = model_version(sweep.runs[0].model_settings, loaded.path)
    except ServerAwayError as error:
        commit = recorded_commit(output_uri, sweep.runs, "model_commit")
        if commit is None or not (options.resume or may_do_without_server):
            raise
        model_path, model = None, Version(MODEL_ID, (), commit)
        away = (f"{error}. Until it answers, its model is taken to be the one that the results record",)
    study = Study(
        experiment_set_id=experiment_set.experiment_set_id,
        output_uri=output_uri,
        runs=runs,
        rows=rows,
        players=selection.players,
        config_path=loaded.path.resolve(),
        dataset=experiment_set.dataset,
        dataset_commit=table.commit,
        model_path=None if model_path is None else model_path.resolve(),
        model_version=model,
        trackers=placed_trackers(experiment_set, output_uri),
        runtime=experiment_set.runtime,
        options=options,
        server_limits=_server_limits(options, sweep.runs[0].connector),
        config={**loaded.data, "selection": chosen.model_dump(mode="json")},
        dataset_content=content_of(table, experiment_set),
        encoders=encoders,
    )
    return study, (*loaded.warnings, *sweep.warnings, *selection.warnings, *away)


def _server_limits(options: RunOptions, connector: str) -> ServerLimits:
    if connector != CONNECTOR and (options.max_requests is not None or options.max_tokens is not None):
        raise UsageError(
            f"--max-requests and --max-tokens limit what a server is asked, and connector {connector!r} asks "
            "none; leave them out"
        )
    return ServerLimits(options.server_patience_s, options.max_requests, options.max_tokens)


def check_output(study: Study) -> None:
    """Refuse an output directory whose content the call does not expect. Reads only.

    Raises:
        OutputError: If it is not writable, or holds results without --resume or --overwrite.
    """
    options, storage = study.options, open_storage(study.output_uri)
    storage.probe()
    records = study.records()
    # The older runner draws other coalitions and stores less.
    older = [name for name, found in records.items() if found.is_of_older_runner()]
    if older and not options.overwrite:
        raise OutputError(
            f"{study.output_uri} holds runs of the older runner: {_listed(older)}. They can be read (status, "
            "verify, report), but neither resumed nor computed again from stored answers. Name another "
            "experiment_set_id or output_root, or give --overwrite, which moves them aside"
        )
    _check_shards(study, storage)
    if options.resume:
        refuse_other_settings(study, usable_specs(study))
    if options.resume or options.overwrite:
        return
    counts = {name: found.sample_count() for name, found in records.items() if found.state() == "started"}
    if taken := [f"{name} ({count})" for name, count in counts.items() if count]:
        raise OutputError(
            f"{study.output_uri} already holds finished samples: {_listed(taken)}. Give --resume to go on "
            "with what is missing, or --overwrite to start again"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check_shards(study: Study, storage: Storage) -> None:
    """Refuse to mix shards and the plain layout."""
    shard = study.options.shard
    if shard is None:
        if found := found_shards(storage):
            raise OutputError(
                f"{study.output_uri} holds {len(found)} shard(s) that are not merged; give --shard I/N, or "
                f"`mllm-shapx merge {study.output_uri}` first"
            )
        return
    whole = study.output_uri.removesuffix(f"/{shard.folder}")
    if has_begun(study, whole):
        raise OutputError(
            f"{whole} holds samples of the whole set already; leave --shard out to go on with them, or name "
            "another experiment_set_id"
        )


def has_begun(study: Study, uri: str | None = None) -> bool:
    """Return whether the study's directory, or the one at `uri`, holds anything of its runs."""
    storage = open_storage(study.output_uri if uri is None else uri)
    return any(RunRecords(storage, run.name).state() != "empty" for run in study.runs)


def open_output(study: Study) -> OpenOutput:
    """Lock the output directory, repair it, and write each run's `spec.json` and checkpoint.

    Raises:
        OutputError: If another driver holds it, or its results have other settings.
    """
    storage = open_storage(study.output_uri)
    lock = OutputLock(storage)
    notes = lock.acquire()
    try:
        specs = {run.name: run_spec(study, run) for run in study.runs}
        inspections, more = _take_over(study, storage, specs)
    except BaseException:
        lock.release()
        raise
    return OpenOutput(lock, inspections, specs, (*notes, *more))


def inspected_again(study: Study, output: OpenOutput) -> OpenOutput:
    """Return the same output, inspected after new samples."""
    inspections = {
        name: replace(records.inspect(study.rows), created_at=output.inspections[name].created_at)
        for name, records in study.records().items()
    }
    return replace(output, inspections=inspections)


def _take_over(
    study: Study, storage: Storage, specs: dict[str, dict[str, Any]]
) -> tuple[dict[str, RunInspection], list[str]]:
    options = study.options
    notes: list[str] = []
    if options.resume:
        notes += _check_settings(study, specs, storage)
    inspections: dict[str, RunInspection] = {}
    old_players = OldPlayers(study.players)
    for run in study.runs:
        records = RunRecords(storage, run.name)
        standing = records.state()
        if options.overwrite and standing != "empty":
            count = records.sample_count()
            # Stored answers are reused, so their environments still matter.
            specs[run.name][ENVIRONMENTS] = history(records.heal_spec()[0])
            notes.append(f"{run.name}: {count} old sample(s) moved to {run.name}/{records.set_aside()}")
        elif standing == "abandoned" and not options.resume:
            notes.append(
                f"{run.name}: samples without a checkpoint moved to {run.name}/{records.set_aside()}; "
                "the run starts afresh"
            )
        inspection = records.inspect(study.rows, old_players.of_run(run))
        notes += (*records.heal(inspection), *inspection.notes)
        # The time in the checkpoint: it identifies a run in W&B.
        created_at = time.time() if inspection.created_at is None else inspection.created_at
        inspections[run.name] = replace(inspection, created_at=created_at)
    made_from = {name: found.made_from for name, found in inspections.items()}
    changed, changes = changed_rows(study, made_from, accept=options.accept_changed_rows)
    old_players.refuse(study.output_uri, changed)
    inspections, more = make_again(study, inspections, changed, changes)
    notes += more
    if (count := CoalitionStore(storage).remove_leftovers()) > 0:
        notes.append(f"{GENERATIONS}: {count} unfinished file(s) of writes that were cut short removed")
    write_json(storage, CONFIG, study.config)
    for name, records in study.records().items():
        records.write_spec(specs[name])
        records.checkpoint_writer(study.rows, inspections[name]).write()
    return inspections, notes


def _check_settings(study: Study, specs: dict[str, dict[str, Any]], storage: Storage) -> list[str]:
    """Refuse to mix results of different settings in one run's directory; keep the runs' history."""
    notes: list[str] = []
    recorded: dict[str, dict[str, Any]] = {}
    for run in study.runs:
        old, found = RunRecords(storage, run.name).heal_spec()
        notes += found
        if old is None:
            notes += _renamed(storage, run)
            continue
        recorded[run.name] = old
        specs[run.name] |= {
            ENVIRONMENTS: history(old),
            MODEL: old.get(MODEL),
            "libraries": old.get("libraries") or library_versions(),
        }
    refuse_other_settings(study, recorded)
    return notes


def _renamed(storage: Storage, run: RunSpec) -> list[str]:
    """Return a note if an earlier version made the run under another name, with other draws."""
    former = run.former_name
    if former is None or RunRecords(storage, former).state() == "empty":
        return []
    return [f"{run.name}: an earlier version has done it as {former}, which is kept; it is done again"]


def prune_answers(study: Study) -> PruneResult:
    """Remove stored answers that no run of the study needs: of other settings, models or rows.

    Raises:
        OutputError: When a driver is running in the directory.
    """
    storage = open_storage(study.output_uri)
    with OutputLock(storage):
        keys = keys_in_use(storage, study.runs, study.model_commit)
        return CoalitionStore(storage).prune(keys, frozenset(study.rows))


def study_config(directory: str) -> Path:
    """Return the config copy in a study's directory.

    Raises:
        UsageError: If the directory holds no results.
        OutputError: If it has none, or is not on this machine.
    """
    if is_uri(directory):
        raise OutputError(
            f"{directory} is not on this machine, where this command needs the study's config and its files; "
            "copy the directory here and name the copy"
        )
    root = Path(directory)
    for folder in (root, root.parent):
        if folder.parent.name == SHARDS:
            raise OutputError(
                f"{directory} is a shard; `mllm-shapx merge {folder.parent.parent}` first, and name "
                "the set's directory"
            )
    for folder in (root, root.parent):
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    if all(run.is_of_older_runner for run in open_study(directory).runs):
        raise OutputError(
            f"{directory} was written by the older runner, which keeps neither its config nor the model's "
            "answers; explain the rows again in another study"
        )
    raise OutputError(
        f"{directory} holds no {CONFIG}, so that its settings are not known; run `mllm-shapx run --config "
        "CONFIG --resume` with the config that it was made with"
    )
