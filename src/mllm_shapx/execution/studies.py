"""A config from start to end: prepare, take the directory, execute, release."""

import contextlib
from collections.abc import Iterator

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import DatasetError, ModelError, OutputError
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.outcome import StudyOutcome
from mllm_shapx.execution.preparation import OpenOutput, check_output, open_output, prepare
from mllm_shapx.execution.signals import stop_requests
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
    if inline:
        from mllm_shapx.execution.inline import run_inline

        with stop_requests() as request, _opened(study, options, reporter) as output:
            return run_inline(study, options, output, reporter, request)
    from mllm_shapx.execution.cluster import connected, plan_resources

    # The handlers come after `ray.init`, which replaces them.
    with connected(options), stop_requests() as request:
        resources = plan_resources(options, study.runs[0].device)
        from mllm_shapx.execution.driver import Driver

        with _opened(study, options, reporter) as output:
            return Driver(study, options, resources, output, reporter, request=request).run()


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
