"""Joins the shards of a study into one directory, equal to that of a single call."""

import contextlib

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.execution.aggregator import write_summaries
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, outcome_of
from mllm_shapx.execution.preparation import CONFIG, open_output, prepare
from mllm_shapx.execution.spec_content import refuse_other_settings
from mllm_shapx.records.lock import OutputLock
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.shards import ShardMerger, all_shards
from mllm_shapx.records.storage import join_uri, open_storage


def shard_config(directory: str) -> str:
    """Return the path of the config of a study's shards.

    Raises:
        OutputError: When there are no shards, or not all.
    """
    return join_uri(directory, all_shards(open_storage(directory))[0].folder, CONFIG)


def merge_shards(loaded: LoadedConfig) -> StudyOutcome:
    """Move the results of a study's shards to the plain layout, and write the summaries.

    Raises:
        UsageError: When shards are missing, are being written, or do not fit together; nothing is changed.
        StorageError: When a file cannot be moved; calling it again continues.
    """
    study, _ = prepare(loaded, RunOptions(resume=True))
    storage = open_storage(study.output_uri)
    shards = all_shards(storage)
    with contextlib.ExitStack() as stack:
        for place in ("", *(shard.folder for shard in shards)):
            uri = join_uri(study.output_uri, place) if place else study.output_uri
            stack.enter_context(OutputLock(open_storage(uri)))
        merger = ShardMerger(storage, shards, [run.name for run in study.runs])
        specs = merger.check()
        refuse_other_settings(study, specs)
        for name, spec in specs.items():
            RunRecords(storage, name).write_spec(spec)
        merger.move()
    output = open_output(study)
    try:
        write_summaries(storage, study)
    finally:
        output.lock.release()
    rows = set(study.rows)
    done = {name: len(rows & found.completed) for name, found in output.inspections.items()}
    failed = {name: len(rows & found.failed) for name, found in output.inspections.items()}
    finished = not study.units_left(output.inspections)
    return outcome_of(study, done, failed, finished=finished, warnings=output.notes)
