"""A config from start to end: prepare, take the directory, execute, release."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import DatasetError, ModelError, OutputError
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome, counted
from mllm_shapx.execution.preparation import OpenOutput, check_output, has_begun, open_output, prepare
from mllm_shapx.execution.rescoring import finish_from_stored
from mllm_shapx.execution.signals import JOB_VARIABLE, StopNow, StopRequest
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.outlook import Outlook
from mllm_shapx.reporting.progress import ProgressReporter

_UNPACKED = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the working directory of a job."""


def run_config(
    loaded: LoadedConfig,
    options: RunOptions,
    reporter: ProgressReporter,
    *,
    inline: bool,
    request: StopRequest | None = None,
) -> StudyOutcome:
    """Do all the work of one config.

    Args:
        loaded: The config.
        options: What the call asks for beside it.
        reporter: Shows progress.
        inline: Whether everything is done in this process, without Ray.
        request: Says when a signal came; without one, signals are left to the caller.

    Raises:
        UsageError: For anything that the user can mend; nothing is written then.
        StorageError: When results could not be written any more.
    """
    request = request or StopRequest()
    with _naming(loaded):
        study, warnings = prepare(loaded, options)
        outlook = Outlook(study.output_uri, study.runs, study.rows, study.players)
        outlook.refuse_hopeless(all_runs=True)
        _check_that_it_stays(study)
        check_output(study, options)
    for warning in (*warnings, *outlook.warnings()):
        reporter.message(f"warning: {warning}")
    with contextlib.ExitStack() as stack:
        output: OpenOutput | None = None
        if options.resume and has_begun(study):
            # Before Ray is started: what cannot go on is refused at once, and what is done needs no worker.
            output = stack.enter_context(_opened(study, options, reporter, request))
            with request.draining(options.grace_s):
                found = finish_from_stored(study, output, reporter, request)
            if isinstance(found, StudyOutcome):
                return _counted(study, found)
            if request.signal is not None:
                raise StopNow(request.exit_code)
            output = found
        outcome = _run_with_model(study, options, output, reporter, inline=inline, request=request)
        return _counted(study, outcome)


def _run_with_model(
    study: Study,
    options: RunOptions,
    output: OpenOutput | None,
    reporter: ProgressReporter,
    *,
    inline: bool,
    request: StopRequest,
) -> StudyOutcome:
    """Do the work of a study; `output` is its directory where that is open already."""

    def opened() -> contextlib.AbstractContextManager[OpenOutput]:
        if output is not None:
            return contextlib.nullcontext(output)
        return _opened(study, options, reporter, request)

    if inline:
        from mllm_shapx.execution.inline import run_inline

        with opened() as taken, request.draining(options.grace_s):
            return run_inline(study, options, taken, reporter, request)
    from mllm_shapx.execution.cluster import connected, plan_resources

    with connected(options, request) as folder:
        asked = options
        if options.gpus_per_worker is None and study.worker_gpus is not None:
            asked = replace(options, gpus_per_worker=study.worker_gpus)
        resources = plan_resources(asked, study.worker_device)
        from mllm_shapx.execution.driver import Driver

        with opened() as taken, request.draining(options.grace_s):
            driver = Driver(study, options, resources, taken, reporter, request=request, folder=folder)
            return driver.run()


def _check_that_it_stays(study: Study) -> None:
    """Refuse to write into the copy of the working directory that Ray makes for a job, and removes."""
    if JOB_VARIABLE in os.environ and _UNPACKED in study.output_uri:
        raise OutputError(
            f"output_root is a relative path, which in this Ray job means {study.output_uri}: Ray's own "
            "copy of the working directory, which is removed and which the next job does not have. Name an "
            "absolute path, or a URL, that is there for the next job too"
        )


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
def _opened(
    study: Study, options: RunOptions, reporter: ProgressReporter, request: StopRequest
) -> Iterator[OpenOutput]:
    output = open_output(study, options)
    request.begun = True
    try:
        for note in output.notes:
            reporter.message(note)
        with request.at_the_last(output.lock.release):
            yield output
    finally:
        output.lock.release()
