"""Runs one config: prepares the study, locks its directory, explains the rows."""

import contextlib
import os
from dataclasses import replace

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import OutputError
from mllm_shapx.execution.dataset import naming
from mllm_shapx.execution.inline import InlineCrew
from mllm_shapx.execution.kept import Kept
from mllm_shapx.execution.lifecycle import Call, Crew, run_to_end, taken
from mllm_shapx.execution.loading import LoadModel, load_study_model
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions, check_one_worker
from mllm_shapx.execution.outcome import StudyOutcome
from mllm_shapx.execution.preparation import OpenOutput, check_output, has_begun, prepare
from mllm_shapx.execution.rescoring import finish_from_stored
from mllm_shapx.execution.resources import plan_resources
from mllm_shapx.execution.signals import JOB_VARIABLE, StopNow, StopRequest
from mllm_shapx.reporting.outlook import Outlook
from mllm_shapx.reporting.progress import ProgressReporter

_UNPACKED = "/runtime_resources/working_dir_files/"
"""Part of the path where Ray unpacks a job's working directory."""


def run_config(
    loaded: LoadedConfig,
    options: RunOptions,
    reporter: ProgressReporter,
    *,
    inline: bool,
    request: StopRequest | None = None,
    load: LoadModel | None = None,
    kept: Kept | None = None,
) -> StudyOutcome:
    """Explain the rows of one config by all its runs.

    Args:
        loaded: The config.
        options: The call's options.
        reporter: Shows progress.
        inline: Whether to work in this process, without Ray.
        request: Reports a signal; if None, the caller handles signals.
        load: Loads the model; None for the config's model.
        kept: Keeps Ray and the model for the next config, and counts the requests; None to keep nothing.

    Raises:
        UsageError: For all faults that the user can fix; nothing is written then.
        StorageError: When results could no longer be written.
    """
    call = Call(reporter, request or StopRequest())
    with naming(loaded):
        study, warnings = prepare(loaded, options)
        outlook = Outlook(study.output_uri, study.runs, study.rows, study.players)
        outlook.refuse_hopeless(all_runs=True)
        _check_that_it_stays(study)
        check_output(study)
    for warning in (*warnings, *outlook.warnings()):
        reporter.message(f"warning: {warning}")
    load = load or load_study_model
    with contextlib.ExitStack() as stack:
        output: OpenOutput | None = None
        if options.resume and has_begun(study):
            # Before Ray starts: errors come at once, and a finished study needs no worker.
            output = stack.enter_context(taken(study, call))
            found = finish_from_stored(study, output, call)
            if isinstance(found, StudyOutcome):
                return found
            if call.is_stopped:
                raise StopNow(call.request.exit_code)
            output = found
        kept = kept or stack.enter_context(Kept(workers=False))
        study = replace(study, server_limits=replace(study.server_limits, spent=kept.spent))
        if inline:
            output = output or stack.enter_context(taken(study, call))
            crew: Crew = InlineCrew(study, output, call, load, kept.shelf(load))
        else:
            folder = stack.enter_context(kept.joined(options, call.request))
            from mllm_shapx.execution.autoscaling import NodeRequest, is_autoscaling
            from mllm_shapx.execution.driver import Driver

            grows = is_autoscaling()
            resources = plan_resources(study, grows=grows)
            if study.server_limits.are_counted:
                check_one_worker(resources.workers)
            output = output or stack.enter_context(taken(study, call))
            nodes, idle = None, kept.idle_workers
            if grows:
                nodes, idle = NodeRequest(resources), None  # idle workers would hold nodes
                stack.enter_context(call.request.at_the_last(nodes.clear))
                stack.callback(nodes.clear)
            crew = Driver(study, output, call, resources, folder=folder, load=load, nodes=nodes, idle=idle)
        return run_to_end(crew, study, output, call, kept.note_spent)


def _check_that_it_stays(study: Study) -> None:
    """Refuse to write into Ray's copy of a job's working directory, which Ray removes."""
    if JOB_VARIABLE in os.environ and _UNPACKED in study.output_uri:
        raise OutputError(
            f"output_root is a relative path, which in this Ray job means {study.output_uri}: Ray's own "
            "copy of the working directory, which is removed and which the next job does not have. Name an "
            "absolute path, or a URL, that is there for the next job too"
        )
