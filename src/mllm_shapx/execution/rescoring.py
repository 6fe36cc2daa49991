"""Computes runs from stored answers alone, without a model."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from mllm_shap import ConversationSnapshot

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.table import Table
from mllm_shapx.errors import OutputError, RowError, UsageError
from mllm_shapx.execution.answers import (
    AnswerFiles,
    NotStoredError,
    refuse_likelihoods,
    stored_files,
    vector_kind,
)
from mllm_shapx.execution.dataset import changed_rows, open_study_table
from mllm_shapx.execution.inline import InProcessCrew
from mllm_shapx.execution.lifecycle import Call, run_to_end, taken
from mllm_shapx.execution.messages import Answers, Lease, Study, StudyState, UnitFailure, WorkerInfo
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome
from mllm_shapx.execution.preparation import OpenOutput, check_output, inspected_again, prepare
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.forcing import Forcer
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.environments import sole_environment
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.progress import ProgressReporter

STEP_S = 0.25
"""Seconds of work between two checks of the lock and of signals; a longer row is finished first."""


class _Rescorer:
    """Explains units from stored answers."""

    def __init__(self, study: Study, files: AnswerFiles, table: Table) -> None:
        self.study = study
        self.files = files
        self._table = table

    async def results(
        self, unit: WorkUnit, known: Answers | None = None
    ) -> AsyncIterator[tuple[tuple[str, ...], SampleResult | RowError]]:
        """Yield the sample of each run, or the error of runs that cannot explain the row."""
        runs = [self.study.run(name) for name in unit.run_names]
        try:
            row = load_row(self._table, unit.row_index, runs[0].dataset, runs[0].modality)
            explainer = RowExplainer(row, runs[0])
        except RowError as error:
            yield unit.run_names, error
            return
        stored = self.files.read(unit)[0] if known is None else known
        stored.give_to(explainer.coalitions)
        for run in runs:
            found: SampleResult | RowError
            try:
                kind = vector_kind(run, self.study.encoder_commit(run))
                embed = self.files.embedder(unit, kind, explainer.coalitions.stored)
                forcer = Forcer(explainer.coalitions, run.name, refuse_likelihoods)
                found = await explainer.explain(run, _refuse, embed, forcer=forcer)
            except RowError as error:
                found = error
            yield (run.name,), found


async def _refuse(prompts: Mapping[int, ConversationSnapshot], _keep: Keep) -> None:
    raise NotStoredError("coalition(s)", prompts)


def rescore_config(
    loaded: LoadedConfig,
    options: RunOptions,
    reporter: ProgressReporter,
    request: StopRequest | None = None,
) -> StudyOutcome:
    """Compute a config's missing samples from stored answers; with `overwrite`, all samples.

    Without a `request`, the caller handles signals.

    Raises:
        UsageError: When coalitions, vectors or likelihoods are missing, with their number; nothing is
            written.
    """
    study, warnings = prepare(loaded, options, may_do_without_server=True)
    check_output(study)
    for warning in warnings:
        reporter.message(f"warning: {warning}")
    storage = open_storage(study.output_uri)
    files = stored_files(storage, study.runs, study.model_commit)
    if files is None:
        raise OutputError(
            f"{study.output_uri} holds no answers of this model and these generation settings; run "
            f"`mllm-shapx run --config {loaded.path}` first"
        )
    rescorer = _Rescorer(study, files, open_study_table(study))
    if not options.overwrite:
        made_from = {name: records.read_made_from() for name, records in study.records().items()}
        changed_rows(study, made_from, accept=False)
    asyncio.run(_check(study, rescorer, loaded, overwrite=options.overwrite))
    call = Call(reporter, request or StopRequest())
    with taken(study, call) as output:
        return run_to_end(_StoredCrew(output, call, rescorer), study, output, call)


def finish_from_stored(study: Study, output: OpenOutput, call: Call) -> StudyOutcome | OpenOutput:
    """Finish a study whose samples are done or can be computed from stored answers.

    Returns:
        The outcome; or, if the model has to answer something, the output to continue with. Results until
        then are written.

    Raises:
        StorageError: When results can no longer be written.
        OutputError: When another driver has taken the output directory.
    """
    storage = open_storage(study.output_uri)
    units = study.units_left(output.inspections)
    files = AnswerFiles(storage, study.runs, study.model_commit, "none")
    if units:
        found = stored_files(storage, study.runs, study.model_commit)
        # Only the model's decoder turns a spoken answer into audio.
        if found is None or study.runs[0].modality.output_modality != "text" or found.held(units) != units:
            return output
        files = found
    crew = _StoredCrew(output, call, _Rescorer(study, files, open_study_table(study)))
    try:
        outcome = run_to_end(crew, study, output, call)
    except NotStoredError:
        for note in crew.leave():
            call.reporter.message(note)
        return inspected_again(study, output)
    what = f"{len(units)} row(s) are computed from stored answers" if units else "everything is done"
    call.reporter.message(f"{what}: no model is loaded")
    return outcome


async def _check(study: Study, rescorer: _Rescorer, loaded: LoadedConfig, *, overwrite: bool) -> None:
    """Compute all units without writing; raise an error if anything is missing."""
    done = {} if overwrite else {name: found.sample_rows() for name, found in study.records().items()}
    counts = {"coalition(s)": 0, "vector(s)": 0, "likelihood(s)": 0}
    rows = 0
    for unit in plan_units(study.runs, study.rows, study.players, done):
        try:
            async for _ in rescorer.results(unit):
                pass
        except NotStoredError as missing:
            counts[missing.what] += missing.count
            rows += 1
    if rows:
        what = [f"{count:,} {name}" for name, count in counts.items() if count]
        raise UsageError(
            f"{study.output_uri}: {' and '.join(what)} of {rows} row(s) are not stored; nothing was changed. "
            f"`mllm-shapx run --config {loaded.path} --resume` asks the model for them"
        )


class _StoredCrew(InProcessCrew):
    """Explains rows from stored answers."""

    def __init__(self, output: OpenOutput, call: Call, rescorer: _Rescorer) -> None:
        super().__init__(rescorer.study, output, call)
        self._rescorer = rescorer
        # The stored answers come from the one recorded environment.
        environment = sole_environment(output.specs.values())
        self._environment = None if environment is None else environment.id
        self._me = WorkerInfo(
            "rescore", socket.gethostname(), os.getpid(), "none", rescorer.files.dtype, environment
        )

    def step(self) -> StudyState:
        """See `Crew.step`. Raises a `NotStoredError` when something that a unit needs is not stored."""
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
