"""A config from start to end: prepare, take the directory, execute, release."""

import contextlib
from collections.abc import Iterator

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import DatasetError, ModelError, OutputError
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, counted
from mllm_shapx.execution.preparation import OpenOutput, check_output, has_begun, open_output, prepare
from mllm_shapx.execution.rescoring import finish_from_stored
from mllm_shapx.execution.signals import StopNow, stop_requests
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.outlook import Outlook
from mllm_shapx.reporting.progress import ProgressReporter


def run_config(
    loaded: LoadedConfig, options: RunOptions, reporter: ProgressReporter, *, inline: bool
) -> StudyOutcome:
    """Do all the work of one config.

    Raises:
        UsageError: For anything that the user can mend; nothing is written then.
        StorageError: When results could not be written any more.
    """
    with _naming(loaded):
        study, warnings = prepare(loaded, options)
        outlook = Outlook(study.output_uri, study.runs, study.rows, study.players)
        outlook.refuse_hopeless(all_runs=True)
        check_output(study, options)
    for warning in (*warnings, *outlook.warnings()):
        reporter.message(f"warning: {warning}")
    with contextlib.ExitStack() as stack:
        output: OpenOutput | None = None
        if options.resume and has_begun(study):
            # Before Ray is started: what cannot go on is refused at once, and what is done needs no worker.
            output = stack.enter_context(_opened(study, options, reporter))
            with stop_requests() as request:
                found = finish_from_stored(study, output, reporter, request)
            if isinstance(found, StudyOutcome):
                return _counted(study, found)
            if request.signal is not None:
                raise StopNow(request.exit_code)
            output = found
        return _counted(study, _run_with_model(study, options, output, reporter, inline=inline))


def _run_with_model(
    study: Study,
    options: RunOptions,
    output: OpenOutput | None,
    reporter: ProgressReporter,
    *,
    inline: bool,
) -> StudyOutcome:
    """Do the work of a study; `output` is its directory where that is open already."""

    def opened() -> contextlib.AbstractContextManager[OpenOutput]:
        return _opened(study, options, reporter) if output is None else contextlib.nullcontext(output)

    if inline:
        from mllm_shapx.execution.inline import run_inline

        with stop_requests() as request, opened() as taken:
            return run_inline(study, options, taken, reporter, request)
    from mllm_shapx.execution.cluster import connected, plan_resources

    # The handlers come after `ray.init`, which replaces them.
    with connected(options), stop_requests() as request:
        resources = plan_resources(options, study.runs[0].device)
        from mllm_shapx.execution.driver import Driver

        with opened() as taken:
            return Driver(study, options, resources, taken, reporter, request=request).run()


def _counted(study: Study, outcome: StudyOutcome) -> StudyOutcome:
    """Return the outcome with the samples that are on disk: files are the truth."""
    storage = open_storage(study.output_uri)
    rows = frozenset(study.rows)
    return counted(
        outcome,
        {run.name: len(rows.intersection(RunRecords(storage, run.name).sample_rows())) for run in study.runs},
    )


@contextlib.contextmanager
def _naming(loaded: LoadedConfig) -> Iterator[None]:
    """Let errors of the dataset, the model and the output say which config they belong to."""
    try:
        yield
    except (DatasetError, ModelError, OutputError) as error:
        raise type(error)(f"{loaded.path}: {error}") from error


@contextlib.contextmanager
def _opened(study: Study, options: RunOptions, reporter: ProgressReporter) -> Iterator[OpenOutput]:
    output = open_output(study, options)
    for note in output.notes:
        reporter.message(note)
    try:
        yield output
    finally:
        output.lock.release()
