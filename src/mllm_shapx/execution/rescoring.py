"""Runs computed again from stored answers alone: no model is loaded and none is asked."""

import asyncio
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mllm_shap import ConversationSnapshot

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.digests import row_digest
from mllm_shapx.data.table import Table
from mllm_shapx.errors import OutputError, RowError, StorageError, UsageError
from mllm_shapx.execution.aggregator import Aggregator
from mllm_shapx.execution.answers import AnswerFiles, content_id, stored_dtype, vector_kind
from mllm_shapx.execution.coordinator import Coordinator
from mllm_shapx.execution.dataset import open_study_table, refuse_changed_rows
from mllm_shapx.execution.left import units_left
from mllm_shapx.execution.messages import Answers, Lease, Study, UnitFailure, WorkerInfo
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, ended
from mllm_shapx.execution.preparation import (
    OpenOutput,
    check_output,
    inspected_again,
    open_output,
    prepare,
)
from mllm_shapx.execution.progress import ProgressFeed
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.forcing import Forcer, KeepLikelihood
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.environments import sole_environment
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.reporting.progress import ProgressReporter

_SHOW_S = 1.0


class _MissingError(Exception):
    """Something that a run needs is not stored."""

    def __init__(self, coalitions: int = 0, vectors: int = 0, likelihoods: int = 0) -> None:
        super().__init__(coalitions, vectors, likelihoods)
        self.coalitions = coalitions
        self.vectors = vectors
        self.likelihoods = likelihoods


class _Rescorer:
    """Explains units from what is stored."""

    def __init__(self, study: Study, files: AnswerFiles, table: Table) -> None:
        self.study = study
        self._files = files
        self._table = table

    async def samples(self, unit: WorkUnit, known: Answers | None = None) -> list[SampleResult]:
        """Return the unit's samples.

        Raises:
            _MissingError: When an answer or a vector is not stored.
            RowError: When the row cannot be explained.
        """
        runs = [self.study.run(name) for name in unit.run_names]
        row = load_row(self._table, unit.row_index, runs[0].dataset, runs[0].modality)
        coalitions = open_row(row, runs[0])
        stored = self._files.read(unit)[0] if known is None else known
        if stored.belong_to(coalitions):
            coalitions.know(stored.by_mask)
            coalitions.likelihoods.know(stored.likelihoods)
        samples = []
        for run in runs:
            forcer = Forcer(coalitions, run.name, _refuse_likelihoods)
            sample = await explain_run(
                row,
                coalitions,
                run,
                _refuse,
                self._embedder(unit, run),
                force=forcer.force,
                own_logprobs=forcer.with_logprobs,
            )
            samples.append(replace(sample, row_digest=row_digest(row)))
        return samples

    def _embedder(self, unit: WorkUnit, run: RunSpec) -> Embedder:
        kind = vector_kind(run, self.study.encoder_commit(run))

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


async def _refuse_likelihoods(
    prompts: Sequence[object], _forced: object, _top_k: int, _keep: KeepLikelihood
) -> None:
    raise _MissingError(likelihoods=len(prompts))


def rescore_config(
    loaded: LoadedConfig,
    options: RunOptions,
    reporter: ProgressReporter,
    request: StopRequest | None = None,
) -> StudyOutcome:
    """Compute the runs of a config from stored answers, those only that have no sample unless `overwrite`.

    Args:
        loaded: The config.
        options: What the call asks for beside it.
        reporter: Shows progress.
        request: Says when a signal came; without one, signals are left to the caller.

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
    rescorer = _Rescorer(study, files, open_study_table(study))
    if not options.overwrite:
        refuse_changed_rows(study)
    asyncio.run(_check(study, rescorer, loaded, overwrite=options.overwrite))
    request = request or StopRequest()
    output = open_output(study, options)
    for note in output.notes:
        reporter.message(note)
    try:
        with request.at_the_last(output.lock.release), request.draining(options.grace_s):
            work = _Work(output, rescorer, dtype, reporter, request=request)
            asyncio.run(work.do_all())
            return work.end()
    finally:
        output.lock.release()


def finish_from_stored(
    study: Study, output: OpenOutput, reporter: ProgressReporter, request: StopRequest
) -> StudyOutcome | OpenOutput:
    """Finish a study whose samples are done or can be computed from stored answers; load no model.

    Returns:
        The outcome. Where the model has something to answer, the output to go on with: what was computed
        until that showed is written.

    Raises:
        StorageError: When results cannot be written any more.
        OutputError: When another driver has taken the output directory.
    """
    storage = open_storage(study.output_uri)
    completed = {name: found.completed for name, found in output.inspections.items()}
    failed = {name: found.failed for name, found in output.inspections.items()}
    units = units_left(study, completed, failed)
    dtype = stored_dtype(storage, study.runs, study.model_commit) if units else "none"
    # A spoken answer becomes sound by the model's decoder.
    if dtype is None or (units and study.runs[0].modality.output_modality != "text"):
        return output
    files = AnswerFiles(storage, study.runs, study.model_commit, dtype)
    places = CoalitionStore(storage).places() if units else set()
    if not all(files.holds(unit, places) for unit in units):
        return output
    rescorer = _Rescorer(study, files, open_study_table(study))
    work = _Work(output, rescorer, dtype, reporter, request=request)
    try:
        asyncio.run(work.do_all())
    except _MissingError:
        work.leave()
        return inspected_again(study, output)
    what = f"{len(units)} row(s) are computed from stored answers" if units else "everything is done"
    reporter.message(f"{what}: no model is loaded")
    return work.end()


async def _check(study: Study, rescorer: _Rescorer, loaded: LoadedConfig, *, overwrite: bool) -> None:
    """Go through all units without writing, and refuse when anything is missing."""
    storage = open_storage(study.output_uri)
    done = {
        run.name: set() if overwrite else set(RunRecords(storage, run.name).sample_rows())
        for run in study.runs
    }
    coalitions = vectors = likelihoods = rows = 0
    for unit in plan_units(study.runs, study.rows, study.players, done):
        try:
            await rescorer.samples(unit)
        except _MissingError as missing:
            coalitions += missing.coalitions
            vectors += missing.vectors
            likelihoods += missing.likelihoods
            rows += 1
        except RowError:
            continue
    if rows:
        counts = {"coalition(s)": coalitions, "vector(s)": vectors, "likelihood(s)": likelihoods}
        what = [f"{count:,} {name}" for name, count in counts.items() if count]
        raise UsageError(
            f"{study.output_uri}: {' and '.join(what)} of {rows} row(s) are not stored; nothing was changed. "
            f"`mllm-shapx run --config {loaded.path} --resume` asks the model for them"
        )


class _Work:
    """The work of a study whose answers are stored."""

    def __init__(
        self,
        output: OpenOutput,
        rescorer: _Rescorer,
        dtype: str,
        reporter: ProgressReporter,
        *,
        request: StopRequest,
    ) -> None:
        self._study = study = rescorer.study
        self._output = output
        self._rescorer = rescorer
        self._request = request
        self._started = time.monotonic()
        self._coordinator = Coordinator(study, output.inspections, self._log)
        self._maybe_aggregator: Aggregator | None = None
        self._reporter = reporter
        self._feed = ProgressFeed(reporter)
        # What is computed here was answered before, in the one environment that there was.
        environment = sole_environment(output.specs.values())
        self._environment = None if environment is None else environment.id
        self._me = WorkerInfo("rescore", socket.gethostname(), os.getpid(), "none", dtype, environment)

    async def do_all(self) -> None:
        """Compute the samples of all units, until a signal comes.

        Raises:
            _MissingError: When an answer or a vector of a unit is not stored.
        """
        shown = self._started
        while self._request.signal is None:
            lease = self._coordinator.lease(self._me, ()).lease
            if lease is None:
                return
            await self._do(lease)
            if time.monotonic() - shown > _SHOW_S:
                self._output.lock.check()
                self._feed.show(self._coordinator.snapshot())
                shown = time.monotonic()

    async def _do(self, lease: Lease) -> None:
        unit = lease.unit
        try:
            for sample in await self._rescorer.samples(unit, lease.known):
                sample = replace(sample, environment=self._environment)  # noqa: PLW2901
                self._coordinator.report(self._me, unit.unit_id, sample, Answers())
        except RowError as error:
            failure = UnitFailure(unit.unit_id, unit.run_names, error.reason, str(error), None, final=True)
            self._coordinator.fail(self._me, failure)

    def leave(self) -> None:
        """Write out what was done, for others to go on."""
        self._coordinator.finish()
        for note in self._coordinator.snapshot().notes:
            self._reporter.message(note)
        if self._maybe_aggregator is not None:
            self._maybe_aggregator.finish()

    def end(self) -> StudyOutcome:
        """Write summaries and checkpoints, and return the outcome.

        Raises:
            StorageError: When results cannot be written any more.
        """
        self._coordinator.finish()
        snapshot = self._coordinator.snapshot()
        self._feed.show(snapshot)
        if snapshot.fatal is not None:
            raise StorageError(snapshot.fatal)
        interrupted = self._request.signal is not None and not snapshot.finished
        return StudyOutcome(
            experiment_set_id=self._study.experiment_set_id,
            output_uri=self._study.output_uri,
            done=dict(snapshot.done),
            failed=dict(snapshot.failed),
            total=dict(snapshot.total),
            model_calls=snapshot.model_calls,
            seconds=time.monotonic() - self._started,
            exit_code=self._request.exit_code if interrupted else ended(snapshot),
            warnings=self._aggregator.finish(),
        )

    @property
    def _aggregator(self) -> Aggregator:
        # Made for the first sample: a study that goes on with a model makes another one.
        if self._maybe_aggregator is None:
            self._maybe_aggregator = Aggregator(self._study, self._output.specs, self._output.inspections)
        return self._maybe_aggregator

    def _log(self, sample: SampleResult) -> None:
        self._aggregator.log(sample)
