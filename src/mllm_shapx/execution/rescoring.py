"""Computes runs from stored answers alone, without a model."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from mllm_shap import ConversationSnapshot

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.table import Table
from mllm_shapx.errors import OutputError, RowError, UsageError
from mllm_shapx.execution.answers import AnswerFiles, stored_dtype, vector_kind
from mllm_shapx.execution.dataset import open_study_table, refuse_changed_rows
from mllm_shapx.execution.inline import InProcessCrew
from mllm_shapx.execution.lifecycle import run_to_end, taken
from mllm_shapx.execution.messages import Answers, Lease, Study, StudyState, UnitFailure, WorkerInfo
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome
from mllm_shapx.execution.preparation import OpenOutput, check_output, inspected_again, prepare
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.forcing import Forcer, KeepLikelihood
from mllm_shapx.explaining.similarity import Embedder, Vector
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.environments import sole_environment
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.reporting.progress import ProgressReporter

STEP_S = 0.25
"""Seconds of work between two checks of the lock and of signals; a longer row is finished first."""


class _MissingError(Exception):
    """An answer, a vector or a likelihood that a run needs is not stored."""

    def __init__(self, coalitions: int = 0, vectors: int = 0, likelihoods: int = 0) -> None:
        super().__init__(coalitions, vectors, likelihoods)
        self.coalitions = coalitions
        self.vectors = vectors
        self.likelihoods = likelihoods


class _Rescorer:
    """Explains units from stored answers."""

    def __init__(self, study: Study, files: AnswerFiles, table: Table) -> None:
        self.study = study
        self._files = files
        self._table = table

    async def results(
        self, unit: WorkUnit, known: Answers | None = None
    ) -> AsyncIterator[tuple[tuple[str, ...], SampleResult | RowError]]:
        """Yield the sample of each run, or the error of runs that cannot explain the row.

        Raises:
            _MissingError: When an answer, a vector or a likelihood is not stored.
        """
        runs = [self.study.run(name) for name in unit.run_names]
        try:
            row = load_row(self._table, unit.row_index, runs[0].dataset, runs[0].modality)
            explainer = RowExplainer(row, runs[0])
        except RowError as error:
            yield unit.run_names, error
            return
        stored = self._files.read(unit)[0] if known is None else known
        stored.give_to(explainer.coalitions)
        for run in runs:
            found: SampleResult | RowError
            try:
                forcer = Forcer(explainer.coalitions, run.name, _refuse_likelihoods)
                found = await explainer.explain(run, _refuse, self._embedder(unit, run), forcer=forcer)
            except RowError as error:
                found = error
            yield (run.name,), found

    def _embedder(self, unit: WorkUnit, run: RunSpec) -> Embedder:
        kind = vector_kind(run, self.study.encoder_commit(run))

        async def embed(answers: Sequence[Answer]) -> list[Vector]:
            vectors = self._files.vectors(unit, kind)
            keys = [answer.content_id for answer in answers]
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
    """Compute a config's missing samples from stored answers; with `overwrite`, all samples.

    Args:
        loaded: The config.
        options: The options of the call.
        reporter: Shows progress.
        request: Reports a signal; if None, the caller handles signals.

    Raises:
        UsageError: When coalitions, vectors or likelihoods are missing, with their number; nothing is
            written.
    """
    study, warnings = prepare(loaded, options, may_do_without_server=True)
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
    with taken(study, options, reporter, request) as output:
        crew = _StoredCrew(output, rescorer, dtype)
        return run_to_end(crew, study, output, reporter=reporter, request=request, grace_s=options.grace_s)


def finish_from_stored(
    study: Study,
    output: OpenOutput,
    reporter: ProgressReporter,
    request: StopRequest,
    grace_s: float,
) -> StudyOutcome | OpenOutput:
    """Finish a study whose samples are done or can be computed from stored answers.

    Returns:
        The outcome; or, if the model has to answer something, the output to continue with. Results until
        then are written.

    Raises:
        StorageError: When results can no longer be written.
        OutputError: When another driver has taken the output directory.
    """
    storage = open_storage(study.output_uri)
    completed = {name: found.completed for name, found in output.inspections.items()}
    failed = {name: found.failed for name, found in output.inspections.items()}
    units = study.units_left(completed, failed)
    dtype = stored_dtype(storage, study.runs, study.model_commit) if units else "none"
    # Only the model's decoder turns a spoken answer into audio.
    if dtype is None or (units and study.runs[0].modality.output_modality != "text"):
        return output
    files = AnswerFiles(storage, study.runs, study.model_commit, dtype)
    places = CoalitionStore(storage).places() if units else set()
    if not all(files.holds(unit, places) for unit in units):
        return output
    rescorer = _Rescorer(study, files, open_study_table(study))
    crew = _StoredCrew(output, rescorer, dtype)
    try:
        outcome = run_to_end(crew, study, output, reporter=reporter, request=request, grace_s=grace_s)
    except _MissingError:
        for note in crew.leave():
            reporter.message(note)
        return inspected_again(study, output)
    what = f"{len(units)} row(s) are computed from stored answers" if units else "everything is done"
    reporter.message(f"{what}: no model is loaded")
    return outcome


async def _check(study: Study, rescorer: _Rescorer, loaded: LoadedConfig, *, overwrite: bool) -> None:
    """Compute all units without writing; raise an error if anything is missing."""
    storage = open_storage(study.output_uri)
    done = {
        run.name: set() if overwrite else set(RunRecords(storage, run.name).sample_rows())
        for run in study.runs
    }
    coalitions = vectors = likelihoods = rows = 0
    for unit in plan_units(study.runs, study.rows, study.players, done):
        try:
            async for _ in rescorer.results(unit):
                pass
        except _MissingError as missing:
            coalitions += missing.coalitions
            vectors += missing.vectors
            likelihoods += missing.likelihoods
            rows += 1
    if rows:
        counts = {"coalition(s)": coalitions, "vector(s)": vectors, "likelihood(s)": likelihoods}
        what = [f"{count:,} {name}" for name, count in counts.items() if count]
        raise UsageError(
            f"{study.output_uri}: {' and '.join(what)} of {rows} row(s) are not stored; nothing was changed. "
            f"`mllm-shapx run --config {loaded.path} --resume` asks the model for them"
        )


class _StoredCrew(InProcessCrew):
    """Explains rows from stored answers."""

    def __init__(self, output: OpenOutput, rescorer: _Rescorer, dtype: str) -> None:
        super().__init__(rescorer.study, output)
        self._rescorer = rescorer
        # The stored answers come from the one recorded environment.
        environment = sole_environment(output.specs.values())
        self._environment = None if environment is None else environment.id
        self._me = WorkerInfo("rescore", socket.gethostname(), os.getpid(), "none", dtype, environment)

    def step(self) -> StudyState:
        """See `Crew.step`.

        Raises:
            _MissingError: When an answer, a vector or a likelihood of a unit is not stored.
        """
        started = time.monotonic()
        while lease := self._coordinator.lease(self._me, ()).lease:
            self._runner.run(self._explain(lease))
            if time.monotonic() - started >= STEP_S:
                break
        return self._coordinator.state()

    async def _explain(self, lease: Lease) -> None:
        unit = lease.unit
        async for names, found in self._rescorer.results(unit, lease.known):
            if isinstance(found, RowError):
                failure = UnitFailure(unit.unit_id, names, found.reason, str(found), None, final=True)
                self._coordinator.fail(self._me, failure)
            else:
                sample = replace(found, environment=self._environment)
                self._coordinator.report(self._me, unit.unit_id, sample, Answers())

    def leave(self) -> tuple[str, ...]:
        """Write the results, so that a crew with a model can continue; return notes."""
        notes = self.save().notes
        if self._maybe_aggregator is not None:
            self._maybe_aggregator.finish()
        return notes
