"""Runs computed again from stored answers alone: no model is loaded and none is asked."""

import asyncio
import os
import socket
import time
from collections.abc import Mapping, Sequence

from mllm_shap import ConversationSnapshot

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.sources import open_table
from mllm_shapx.data.table import Table
from mllm_shapx.errors import OutputError, RowError, StorageError, UsageError
from mllm_shapx.execution.aggregator import Aggregator
from mllm_shapx.execution.answers import AnswerFiles, content_id, stored_dtype, vector_kind
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.messages import Answers, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, ended
from mllm_shapx.execution.preparation import OpenOutput, check_output, open_output, prepare
from mllm_shapx.execution.progress import ProgressFeed
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.progress import ProgressReporter

_SHOW_S = 1.0


class _MissingError(Exception):
    """Something that a run needs is not stored."""

    def __init__(self, coalitions: int = 0, vectors: int = 0) -> None:
        super().__init__(coalitions, vectors)
        self.coalitions = coalitions
        self.vectors = vectors


class _Rescorer:
    """Explains units from what is stored."""

    def __init__(self, study: Study, files: AnswerFiles, table: Table) -> None:
        self._study = study
        self._files = files
        self._table = table

    async def samples(self, unit: WorkUnit, known: Answers | None = None) -> list[SampleResult]:
        """Return the unit's samples.

        Raises:
            _MissingError: When an answer or a vector is not stored.
            RowError: When the row cannot be explained.
        """
        runs = [self._study.run(name) for name in unit.run_names]
        row = load_row(self._table, unit.row_index, runs[0].dataset, runs[0].modality)
        coalitions = open_row(row, runs[0])
        stored = self._files.read(unit)[0] if known is None else known
        if stored.belong_to(coalitions):
            coalitions.know(stored.by_mask)
        return [
            await explain_run(row, coalitions, run, _refuse, self._embedder(unit, vector_kind(run)))
            for run in runs
        ]

    def _embedder(self, unit: WorkUnit, kind: str) -> Embedder:
        async def embed(answers: Sequence[Answer]) -> list[Vector]:
            vectors = self._files.vectors(unit, kind)
            keys = [content_id(answer) for answer in answers]
            missing = sum(key not in vectors for key in keys)
            if missing:
                raise _MissingError(vectors=missing)
            return [vectors[key] for key in keys]

        return embed


async def _refuse(prompts: Mapping[int, ConversationSnapshot], _keep: Keep) -> None:
    raise _MissingError(coalitions=len(prompts))


def rescore_config(loaded: LoadedConfig, options: RunOptions, reporter: ProgressReporter) -> StudyOutcome:
    """Compute the runs of a config from stored answers, those only that have no sample unless `overwrite`.

    Raises:
        UsageError: When coalitions or vectors are missing, with their number; nothing is written then.
    """
    study, warnings = prepare(loaded, options)
    check_output(study, options)
    for warning in warnings:
        reporter.message(f"warning: {warning}")
    storage = open_storage(study.output_uri)
    dtype = stored_dtype(storage, study.runs, study.model_commit)
    if dtype is None:
        raise OutputError(
            f"{study.output_uri} holds no answers of this model and these generation settings; run "
            f"`mllm-shapx run --config {loaded.path}` first"
        )
    files = AnswerFiles(storage, study.runs, study.model_commit, dtype)
    rescorer = _Rescorer(study, files, open_table(study.dataset, study.config_path))
    asyncio.run(_check(study, rescorer, loaded, overwrite=options.overwrite))
    output = open_output(study, options)
    for note in output.notes:
        reporter.message(note)
    try:
        return asyncio.run(_run(study, output, rescorer, dtype, reporter))
    finally:
        output.lock.release()


async def _check(study: Study, rescorer: _Rescorer, loaded: LoadedConfig, *, overwrite: bool) -> None:
    """Go through all units without writing, and refuse when anything is missing."""
    storage = open_storage(study.output_uri)
    done = {
        run.name: set() if overwrite else set(RunRecords(storage, run.name).sample_rows())
        for run in study.runs
    }
    coalitions = vectors = rows = 0
    for unit in plan_units(study.runs, study.rows, study.players, done):
        try:
            await rescorer.samples(unit)
        except _MissingError as missing:
            coalitions += missing.coalitions
            vectors += missing.vectors
            rows += 1
        except RowError:
            continue
    if rows:
        counts = {"coalition(s)": coalitions, "vector(s)": vectors}
        what = [f"{count:,} {name}" for name, count in counts.items() if count]
        raise UsageError(
            f"{study.output_uri}: {' and '.join(what)} of {rows} row(s) are not stored; nothing was changed. "
            f"`mllm-shapx run --config {loaded.path} --resume` asks the model for them"
        )


async def _run(
    study: Study, output: OpenOutput, rescorer: _Rescorer, dtype: str, reporter: ProgressReporter
) -> StudyOutcome:
    started = time.monotonic()
    aggregator = Aggregator(study, output.specs, output.inspections)
    coordinator = Coordinator(study, output.inspections, aggregator.log)
    feed = ProgressFeed(reporter)
    me = WorkerInfo("rescore", socket.gethostname(), os.getpid(), "none", dtype)
    shown = started
    while (lease := coordinator.lease(me, ()).lease) is not None:
        try:
            for sample in await rescorer.samples(lease.unit, lease.known):
                coordinator.report(me, lease.unit.unit_id, sample, Answers())
        except RowError as error:
            failure = UnitFailure(
                lease.unit.unit_id, lease.unit.run_names, error.reason, str(error), None, final=True
            )
            coordinator.fail(me, failure)
        if time.monotonic() - shown > _SHOW_S:
            feed.show(coordinator.snapshot())
            shown = time.monotonic()
    coordinator.finish()
    snapshot = coordinator.snapshot()
    feed.show(snapshot)
    if snapshot.fatal is not None:
        raise StorageError(snapshot.fatal)
    return StudyOutcome(
        experiment_set_id=study.experiment_set_id,
        output_uri=study.output_uri,
        done=dict(snapshot.done),
        failed=dict(snapshot.failed),
        total=dict(snapshot.total),
        model_calls=snapshot.model_calls,
        seconds=time.monotonic() - started,
        exit_code=ended(snapshot),
        warnings=aggregator.finish(),
    )
