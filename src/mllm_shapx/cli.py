"""The command line: parse, call, print. `mllm-shapx` is `python -m mllm_shapx`."""

import contextlib
import functools
import glob
import logging
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from mllm_shapx.config.paths import exists, expanded, matches, real
from mllm_shapx.errors import ConfigError, DatasetError, OutputError, ShapxError, UsageError
from mllm_shapx.execution.signals import StopNow, StopRequest, stop_requests
from mllm_shapx.plaintext import ShownFormatter
from mllm_shapx.terminal import (
    UNEXPECTED,
    FilePath,
    Location,
    Number,
    make_streams_safe,
    report_unexpected,
    say,
    say_json,
    whole,
)

if TYPE_CHECKING:
    from mllm_shapx.config.loading import LoadedConfig
    from mllm_shapx.data.selection import Selection
    from mllm_shapx.execution.options import Again, RunOptions
    from mllm_shapx.execution.outcome import StudyOutcome
    from mllm_shapx.planning.sweep import Sweep
    from mllm_shapx.records.shards import Shard
    from mllm_shapx.reporting.batch import BatchItem

_NOT_REPEATED = {"config", "configs", "named", "config_list", "more", "resume", "overwrite"}
"""Options that the command that goes on does not repeat as they are."""
_RESUMABLE = {"run", "demo", "retry", "rescore"}
_SHARD = ("shard", "shard_index", "num_shards")
_OWNED_BY_SLURM = {"named", "config_list", "more", "resume", "overwrite", "address", "nodes", *_SHARD}
"""Options of `run` that the batch script gives itself."""
INTERRUPTED_FROM = 128
"""Exit codes above it say by which signal the work was ended."""

_ROWS = whole(1, 1_000_000_000, "and no dataset that is taken has as many rows")
_WORKERS = whole(1, 10_000, "and one coordinator serves no more")
_SHARDS = whole(1, 10_000, "and no site takes larger job arrays")
_NODES = whole(1, 10_000, "and no Ray cluster has more")
_ANSWERS = whole(1, 1_000_000_000, "and no study stores as many answers")
_ROWS_IN_FLIGHT = whole(1, 4096, "for a worker holds the answers of all of them in memory")
_YEAR_S, _A_YEAR = 31_536_000, "which is a year"


class _Commands(click.Group):
    """Ends with the exit code of an error, and shows a traceback only to those who ask for it."""

    def main(self, *args: Any, **extra: Any) -> Any:
        make_streams_safe()
        try:
            return super().main(*args, **extra)
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 -- the last net; Rust libraries panic outside Exception
            report_unexpected(error)
            sys.exit(UNEXPECTED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = StopRequest()
        if args and args[0] in _RESUMABLE:
            resume = args[0] == "run" and not {"--resume", "--overwrite"} & set(args)
            ctx.obj.again = shlex.join(["mllm-shapx", *args, *(["--resume"] if resume else [])])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        request = ctx.obj
        try:
            with stop_requests(request):
                return super().invoke(ctx)
        except ShapxError as error:
            if logging.getLogger().isEnabledFor(logging.DEBUG):
                traceback.print_exc()
            say(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except StopNow as stop:
            _leave(int(stop.code or 0))
        except SystemExit:
            # Ray makes exit code 1 of what a handler raises in its calls.
            if request.signal is not None:
                _leave(request.exit_code)
            raise


def _leave(code: int) -> NoReturn:
    """End the process after a signal: an ordinary end waits for threads in which a model computes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mllm-shapx", prog_name="mllm-shapx")
def main() -> None:
    """Run whole Shapley-value studies of language and speech models: one config, many GPUs, nothing lost."""
    _set_log_level(os.environ.get("LOG_LEVEL", "WARNING"))
    _put_source_first(os.environ.get("MLLM_SHAP_SRC", ""))


def with_configs(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its config files, as `configs`: a tuple of paths, each once, at least one."""

    @click.option(
        "--config", "named", multiple=True, metavar="FILE...", help="Config file or glob; may be repeated."
    )
    @click.option(
        "--config-list",
        type=FilePath(),
        metavar="FILE",
        help="File that names config files, one a line.",
    )
    @click.argument("more", nargs=-1, metavar="")
    @functools.wraps(command)
    def wrapped(named: Sequence[str], config_list: Path | None, more: Sequence[str], **options: Any) -> None:
        command(configs=config_files([*named, *more], config_list), **options)

    return wrapped


def with_resources(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where and how long the work is done."""
    options = (
        click.option(
            "--num-gpus",
            type=Number(0, 100_000, "and no cluster has more"),
            help="GPUs to use; all there are by default.",
        ),
        click.option("--num-workers", type=_WORKERS, help="Workers; one per GPU by default."),
        click.option(
            "--workers-per-gpu",
            type=whole(1, 64, "for each worker holds a model of its own"),
            default=1,
            show_default=True,
        ),
        click.option(
            "--gpus-per-worker",
            type=Number(0, 1024, "and no machine has more", above=True),
            help="GPUs of one worker.",
        ),
        click.option(
            "--rows-in-flight",
            type=_ROWS_IN_FLIGHT,
            help="Rows that one worker explains side by side; as many as fill its batches by default.",
        ),
        click.option(
            "--address", help="Ray cluster to join; RAY_ADDRESS, else one on this machine, by default."
        ),
        click.option(
            "--wait-for-nodes",
            "nodes",
            type=_NODES,
            default=1,
            help="Nodes that the Ray cluster must have first.",
        ),
        click.option(
            "--max-attempts",
            type=whole(1, 1000, "for each attempt takes a worker down"),
            default=3,
            show_default=True,
        ),
        click.option("--fail-fast", is_flag=True, help="Stop at the first quarantined sample."),
        click.option(
            "--max-failures", metavar="N|F%", callback=_failure_limit, help="Stop when more are quarantined."
        ),
        click.option(
            "--stall-timeout",
            "stall_s",
            type=Number(1, _YEAR_S, _A_YEAR),
            default=1800.0,
            show_default=True,
            help="Seconds without progress after which a worker is replaced.",
        ),
        click.option(
            "--server-patience",
            "server_patience_s",
            type=Number(0, _YEAR_S, _A_YEAR),
            default=600.0,
            show_default=True,
            help="Seconds without any answer of a model's server after which the study stops.",
        ),
        click.option(
            "--max-requests",
            type=whole(1, 10**12, "and no server answers as many"),
            help="Stop before a model's server gets more requests than this.",
        ),
        click.option(
            "--max-tokens",
            type=whole(1, 10**15, "and no server answers as many"),
            help="Stop before prompts and answers take more tokens of a server than this.",
        ),
        click.option(
            "--flush-every",
            "flush_s",
            type=Number(0.1, _YEAR_S, _A_YEAR),
            default=30.0,
            show_default=True,
            help="Seconds after which answers of a long row are written out.",
        ),
        click.option(
            "--grace",
            "grace_s",
            type=Number(0, _YEAR_S, _A_YEAR),
            default=30.0,
            show_default=True,
            help="Seconds that rows under way get after the first SIGINT or SIGTERM.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _shard_text(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9]{1,4}/[0-9]{1,5}", value):
        raise click.BadParameter(f"{value[:60]!r} is not I/N, such as 0/4 for the first of four shards")
    return value


def _shard(text: str | None, index: int | None, count: int | None) -> "Shard | None":
    """Return the shard that a call names.

    Raises:
        UsageError: When it is named twice, by half, or is none of N.
    """
    from mllm_shapx.records.shards import Shard

    if text is not None:
        if index is not None or count is not None:
            raise UsageError("--shard and --shard-index with --num-shards say the same; give one of them")
        index, count = map(int, text.split("/"))
    if index is None and count is None:
        return None
    if index is None or count is None:
        raise UsageError("--shard-index and --num-shards go together; give both, or --shard I/N")
    if index >= count:
        raise UsageError(
            f"--shard {index}/{count}: shards count from 0, so that the last one is {count - 1}/{count}"
        )
    return Shard(index, count)


def _failure_limit(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9]{1,10}|([0-9]{1,2}(\.[0-9]{1,9})?|100)%", value):
        raise click.BadParameter(
            f"{value[:60]!r} is neither a number of samples of at most 10 digits nor a percentage such as 5%"
        )
    return value


@main.command()
@with_configs
@click.option("--check-dataset", is_flag=True, help="Open the dataset and select the rows too.")
@click.option("--check-model", is_flag=True, help="Look at the model too; a server is asked for its models.")
def validate(configs: Sequence[Path], check_dataset: bool, check_model: bool) -> None:
    """Say whether configs can be used; list everything that is wrong with them."""
    from mllm_shapx.execution.study_plan import selected
    from mllm_shapx.planning.sweep import expand

    errors = []
    for loaded in load_configs(configs):
        try:
            sweep = expand(loaded.experiment_set, str(loaded.path))
            _check_encoders(loaded, sweep)
            selection = selected(loaded, sweep) if check_dataset else None
            foreseen = [] if selection is None else _foresee(loaded, sweep, selection)
            found = f", {_look_at_model(loaded, sweep)}" if check_model else ""
        except UsageError as error:
            errors.append(error)
            continue
        _warn(loaded, sweep, selection, foreseen)
        if selection is not None:
            found = f", {len(selection.rows):,} row(s){found}"
        say(f"{loaded.path}: ok: {loaded.experiment_set.experiment_set_id}, {len(sweep.runs)} run(s){found}")
    _refuse(errors)


@main.command()
@with_configs
@click.option("--json", "as_json", is_flag=True, help="Print the plan as data.")
@click.option("--skip-data", is_flag=True, help="Do not touch the dataset: runs only, no figures.")
def plan(configs: Sequence[Path], as_json: bool, skip_data: bool) -> None:
    """Show the runs, the rows, what they will ask of the model, and what of it is done."""
    from mllm_shapx.execution.study_plan import study_plan

    plans = []
    for loaded in load_configs(configs):
        found = study_plan(loaded, skip_data=skip_data)
        for warning in found.warnings:
            say(f"warning: {loaded.path}: {warning}", err=True)
        plans.append(found)
    if as_json:
        data = [
            {**item.plan.to_json(), "standing": None if item.standing is None else item.standing.to_json()}
            for item in plans
        ]
        say_json(data[0] if len(data) == 1 else data)
        return
    texts = (
        item.plan.to_text()
        if item.standing is None
        else f"{item.plan.to_text()}\n\n{item.standing.to_text()}"
        for item in plans
    )
    say("\n\n".join(texts))


@main.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from mllm_shapx.config.loading import schema as config_schema

    say_json(config_schema())


@main.command()
@with_configs
@click.option("--resume", is_flag=True, help="Skip what is done and go on with the rest.")
@click.option(
    "--overwrite", is_flag=True, help="Start again; old samples are moved aside, answers are reused."
)
@click.option(
    "--accept-changed-rows",
    is_flag=True,
    help="With --resume: explain rows again that were changed in the dataset; old samples are moved aside.",
)
@click.option("--max-samples", type=_ROWS, help="Explain at most so many rows.")
@click.option(
    "--shard",
    metavar="I/N",
    callback=_shard_text,
    help="Explain every N-th row from row I on (0 to N-1), for `merge` to join.",
)
@click.option("--shard-index", type=whole(0, 9_999, "and there are fewer shards"), help="I of --shard I/N.")
@click.option("--num-shards", type=_SHARDS, help="N of --shard I/N.")
@with_resources
@click.option(
    "--max-retries",
    type=whole(0, 100, "for a study that fails so often needs a look"),
    default=0,
    show_default=True,
    help="Times that a config that fails is tried again.",
)
@click.option(
    "--retry-delay",
    "retry_delay_s",
    type=Number(0, _YEAR_S, _A_YEAR),
    default=30.0,
    show_default=True,
    help="Seconds before it is tried again.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--inline", is_flag=True, help="Do the work in this process, without Ray.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as data.")
@click.option("--table", is_flag=True, help="Show some rows and all runs at the end.")
@click.option(
    "--mark", metavar="COLUMN", help="With --table: rank the word that this column of the dataset holds."
)
def run(
    configs: Sequence[Path],
    *,
    inline: bool,
    as_json: bool,
    table: bool,
    mark: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Explain the rows of configs by all their runs."""
    from mllm_shapx.execution.options import Again, RunOptions

    if options["resume"] and options["overwrite"]:
        raise UsageError("--resume and --overwrite exclude each other; give one of them")
    if options["accept_changed_rows"] and not options["resume"]:
        raise UsageError("--accept-changed-rows goes with --resume; give both")
    shard = _shard(*(options.pop(name) for name in _SHARD))
    again = Again(options.pop("max_retries"), options.pop("retry_delay_s"))
    loaded, wanted = load_configs(configs), RunOptions(shard=shard, **options)
    if dry_run:
        _dry_run(loaded, wanted)
        return
    _execute(loaded, wanted, inline=inline, as_json=as_json, table=table, mark=mark, again=again)


@main.command()
@click.option(
    "--config",
    "config",
    type=FilePath(),
    default="configs/demo.json",
    show_default=True,
    help="Config of the demo.",
)
@click.option("--num-workers", type=_WORKERS, default=2, show_default=True, help="Workers on the CPU.")
@click.option("--inline", is_flag=True, help="Do the work in this process, without Ray.")
def demo(config: Path, num_workers: int, inline: bool) -> None:
    """Explain the rows that the repository ships with the model that it ships."""
    from mllm_shapx.execution.options import RunOptions

    if not config.is_file():
        raise UsageError(f"{config} is not there; run this in a checkout of the repository, or give --config")
    options = RunOptions(overwrite=True, num_workers=num_workers)
    _execute(load_configs([config]), options, inline=inline, table=True, mark="planted_word")


@main.command()
@click.argument("directory", type=Location(), required=False)
@click.option("--config", type=FilePath(), help="Config of the set; the shards' copy of it by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as data.")
def merge(directory: str | None, config: Path | None, as_json: bool) -> None:
    """Join the shards in a set's DIRECTORY, as if one run had made them."""
    from mllm_shapx.execution.merging import merge_shards, shard_config

    if directory is None and config is None:
        raise UsageError("no set is named; give its directory, or --config FILE")
    (loaded,) = load_configs([config or Path(shard_config(str(directory)))])
    outcome = merge_shards(loaded)
    if as_json:
        say_json(outcome.to_json())
    else:
        for note in outcome.warnings:
            say(note, err=True)
        say(outcome.to_text(f"mllm-shapx run --config {shlex.quote(str(loaded.path))} --resume"))
    if outcome.exit_code:
        sys.exit(outcome.exit_code)


@main.command()
@click.argument("directory", type=Location())
@click.option("--check", is_flag=True, help="Read every sample; exit code 1 when one is damaged.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as data.")
def status(directory: str, check: bool, as_json: bool) -> None:
    """Say how far a study is, from its files alone."""
    from mllm_shapx.reporting.status import status as read_status

    found = read_status(directory, check=check)
    if as_json:
        say_json(found.to_json())
    else:
        say(found.to_text(_width()), nl=False)
    if found.damaged:
        sys.exit(1)


@main.command()
@click.argument("directory", type=Location())
@click.option("--reason", "reasons", multiple=True, help="Only failures of this reason; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the failures as data.")
def failures(directory: str, reasons: Sequence[str], as_json: bool) -> None:
    """List the samples that were given up, and why."""
    from mllm_shapx.reporting.failures import failures as read_failures

    found = read_failures(directory, reasons=reasons)
    if as_json:
        say_json(found.to_json())
    else:
        say(found.to_text(_width()), nl=False)


@main.command()
@click.argument("directory", type=Location())
@click.option("--only", "reasons", multiple=True, metavar="REASON", help="Only failures of this reason.")
@with_resources
@click.option("--inline", is_flag=True, help="Do the work in this process, without Ray.")
def retry(directory: str, reasons: Sequence[str], inline: bool, **options: Any) -> None:
    """Try the samples again that were given up, and nothing else."""
    from mllm_shapx.execution.options import RunOptions
    from mllm_shapx.execution.preparation import study_config
    from mllm_shapx.reporting.failures import failures as read_failures

    rows: dict[str, list[int]] = {}
    for failure in read_failures(directory, reasons=reasons).failures:
        rows.setdefault(failure.record.run_name, []).append(failure.record.row_index)
    if not rows:
        say(f"{directory}: no sample to try again")
        return
    loaded = load_configs([study_config(directory)])
    retried = {name: tuple(indices) for name, indices in rows.items()}
    _execute(loaded, RunOptions(resume=True, retry_rows=retried, **options), inline=inline)


@main.command()
@with_configs
@click.option("--overwrite", is_flag=True, help="Compute all samples again; old ones are moved aside.")
@click.option("--max-samples", type=_ROWS, help="Take at most so many rows.")
def rescore(configs: Sequence[Path], overwrite: bool, max_samples: int | None) -> None:
    """Compute runs from stored answers alone, without loading the model."""
    from mllm_shapx.execution.options import RunOptions
    from mllm_shapx.execution.rescoring import rescore_config
    from mllm_shapx.reporting.progress import ProgressReporter

    options = RunOptions(resume=not overwrite, overwrite=overwrite, max_samples=max_samples)
    codes = [0]
    request = _request()
    files = load_configs(configs)
    for number, loaded in enumerate(files):
        request.again = request.resume = _command(files[number:])
        interactive = None if loaded.experiment_set.runtime.progress_bar else False
        with ProgressReporter(sys.stderr, interactive) as reporter:
            outcome = rescore_config(loaded, options, reporter, request)
        say(outcome.to_text(request.go_on))
        codes.append(outcome.exit_code)
        if request.signal is not None and number + 1 < len(files):
            codes.append(request.exit_code)
            if outcome.exit_code <= INTERRUPTED_FROM:
                request.again = request.resume = _command(files[number + 1 :])
                _say_what_is_left(request, len(files) - number - 1)
            break
    if max(codes):
        sys.exit(max(codes))


@main.group()
def store() -> None:
    """Look after the answers that are kept for other runs."""


@store.command("info")
@click.argument("directory", type=Location())
@click.option("--json", "as_json", is_flag=True, help="Print it as data.")
def store_info(directory: str, as_json: bool) -> None:
    """Say what answers a study keeps."""
    from mllm_shapx.reporting.stored import stored

    found = stored(directory)
    if as_json:
        say_json(found.to_json())
    else:
        say(found.to_text(_width()), nl=False)


@store.command("prune")
@with_configs
def store_prune(configs: Sequence[Path]) -> None:
    """Remove answers that no run of the configs needs."""
    from mllm_shapx.execution.options import RunOptions
    from mllm_shapx.execution.preparation import prepare, prune_answers

    for loaded in load_configs(configs):
        study, _ = prepare(loaded, RunOptions())
        removed = prune_answers(study)
        say(
            f"{study.output_uri}: removed the answers of {removed.entries} row(s) and generation key(s), "
            f"{removed.num_bytes / 1e6:.1f} MB"
        )


@main.command()
@click.argument("directories", nargs=-1, required=True, type=Location(), metavar="DIRECTORY...")
@click.option(
    "--again",
    type=_ANSWERS,
    metavar="N",
    help="Load the model, generate N random stored answers again, one at a time, and compare them.",
)
@click.option(
    "--seed",
    type=whole(0, 2**32 - 1, "which is the largest seed"),
    default=0,
    show_default=True,
    help="Which answers --again draws.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as data.")
def verify(directories: Sequence[str], again: int | None, seed: int, as_json: bool) -> None:
    """Check finished directories: every sample, the counts, the efficiency of exact values."""
    from mllm_shapx.reporting.verify import verify as check

    found = check(directories)
    if not as_json:
        say(found.text())
    rechecks = []
    if again is not None:
        from mllm_shapx.execution.recheck import recheck

        tell = functools.partial(say, err=True)
        rechecks = [recheck(directory, again, seed, tell) for directory in directories]
    if as_json:
        asked = {} if again is None else {"again": [each.to_json() for each in rechecks]}
        say_json({**found.to_json(), **asked})
    else:
        for each in rechecks:
            say(each.to_text())
    if not (found.ok and all(each.ok for each in rechecks)):
        sys.exit(1)


@main.command()
@click.argument("directory", type=Location())
@click.option("--output", type=FilePath(), help="The page to write; report.html in DIRECTORY.")
@click.option(
    "--accept-changed-rows", is_flag=True, help="Show samples of rows that were changed in the dataset too."
)
def report(directory: str, output: Path | None, accept_changed_rows: bool) -> None:
    """Write an HTML page that shows prompts with their values."""
    from mllm_shapx.reporting.html import report as write_report

    say(write_report(directory, output, accept_changed_rows=accept_changed_rows))


@main.command()
@with_configs
@click.option("--time", required=True, metavar="LIMIT", help="Time limit, such as 12:00:00 or 2-00:00:00.")
@click.option("--nodes", type=_NODES, default=1, show_default=True, help="Nodes of the job.")
@click.option(
    "--gpus-per-node", type=whole(0, 64, "and no node has more"), default=0, show_default=True, help="GPUs."
)
@click.option(
    "--cpus-per-node", type=whole(1, 4096, "and no node has more"), help="CPUs; 4 for each GPU by default."
)
@click.option(
    "--array", "shards", type=_SHARDS, help="Make a job array of so many shards, for `mllm-shapx merge`."
)
@click.option(
    "--drain-before",
    "drain_before_s",
    type=whole(30, 65_535, "and Slurm takes no larger value"),
    default=120,
    show_default=True,
    help="Seconds before the time limit at which the study drains and the job is requeued.",
)
@click.option("--module", "modules", multiple=True, help="Environment module to load; may be repeated.")
@click.option("--venv", help="Virtual environment to activate; the one of this command by default.")
@click.option("--setup", help="Shell file to source after it.")
@click.option("--job-name", "name", help="Name of the job and its log; the config's by default.")
@click.option("--sbatch", multiple=True, metavar="OPTION", help="Other option of sbatch; may be repeated.")
@click.option(
    "--run-options", default="", metavar="TEXT", help='Options of `run`, such as "--workers-per-gpu 2".'
)
@click.option("--submit", "submits", is_flag=True, help="Submit the script instead of printing it.")
def slurm(
    configs: Sequence[Path],
    *,
    nodes: int,
    venv: str | None,
    name: str | None,
    run_options: str,
    submits: bool,
    **options: Any,
) -> None:
    """Print the batch script that runs configs on Slurm, or submit it."""
    from mllm_shapx.execution.slurm import SlurmJob, job_name, script, submit

    paths = tuple(str(loaded.path) for loaded in load_configs(configs))
    words = _run_words(run_options)
    if venv is None and sys.prefix != sys.base_prefix:
        venv = sys.prefix
    job = SlurmJob(
        configs=paths, nodes=nodes, name=name or job_name(paths), venv=venv, run_options=words, **options
    )
    if nodes > 1 and "--inline" in words:
        raise UsageError("--run-options: --inline uses one node only; leave it out, or give --nodes 1")
    if submits:
        number = submit(script(job))
        log = job.log.replace("%x", job.name).replace("%j", number).replace("%A", number)
        say(f"submitted job {number}; log: {log.replace('%a', 'SHARD')}; state: squeue --job {number}")
    else:
        click.echo(script(job), nl=False)


def _run_words(text: str) -> tuple[str, ...]:
    """Return the words of --run-options once `run` has taken them."""
    try:
        words = shlex.split(text)
        with run.make_context("run", list(words), resilient_parsing=False) as context:
            given = {name for name in context.params if _is_given(context, name)}
    except (ValueError, click.UsageError) as error:
        said = error.format_message() if isinstance(error, click.UsageError) else error
        raise UsageError(f"--run-options {text!r}: {said}") from error
    if owned := given & _OWNED_BY_SLURM:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(owned))
        raise UsageError(
            f"--run-options {text!r}: {names} cannot be given here, for the script sets it itself"
        )
    return tuple(words)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE


@main.command()
@with_configs
@click.option("--rows", type=_ROWS, help="Rows to explain; as many as the time allows.")
@click.option(
    "--seconds",
    type=Number(0, _YEAR_S, _A_YEAR, above=True),
    default=20.0,
    show_default=True,
    help="About how long each contestant is measured; mllm_shap three times as long.",
)
@click.option(
    "--rows-in-flight",
    type=_ROWS_IN_FLIGHT,
    help="Rows side by side; as many as fill the batches by default.",
)
@click.option("--overhead", is_flag=True, help="Measure too what a coalition costs beside the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as data.")
def bench(configs: Sequence[Path], overhead: bool, as_json: bool, **options: Any) -> None:
    """Measure a config on this machine, beside mllm_shap's own runner and the bare model."""
    from mllm_shapx.benchmark.bench import bench as measure
    from mllm_shapx.benchmark.options import OVERHEAD_PLAYERS, BenchOptions

    if len(configs) > 1:
        raise UsageError(f"bench measures one config at a time, not {len(configs)}")
    (loaded,) = load_configs(configs)
    asked = BenchOptions(overhead=OVERHEAD_PLAYERS if overhead else (), **options)
    found = measure(loaded, asked, lambda text: say(text, err=True))
    if as_json:
        say_json(found.to_json())
    else:
        say(found.to_text())


def config_files(named: Sequence[str], config_list: Path | None) -> tuple[Path, ...]:
    """Return the config files that a call names, globs expanded in name order, each file once.

    Raises:
        UsageError: When a glob matches nothing or no file is named at all.
    """
    names: list[tuple[str, Path | None]] = [(name, None) for name in named]
    if config_list is not None:
        lines = map(str.strip, _list_text(config_list).splitlines())
        names += [(line, config_list) for line in lines if line and not line.startswith("#")]
    files: dict[Path, Path] = {}
    for name, origin in names:
        for file in _expanded(name, origin):
            files.setdefault(real(file), file)
    if not files:
        where = f"{config_list} names no config" if config_list is not None else "no config is named"
        raise UsageError(f"{where}; give --config FILE, or --config-list FILE with one path a line")
    return tuple(files.values())


def load_configs(files: Sequence[Path]) -> "list[LoadedConfig]":
    """Load all configs.

    Raises:
        ConfigError: When one of them is wrong; UsageError with all messages when several are, or when two
            of them write to the same directory.
    """
    from mllm_shapx.config.loading import load_config

    loaded, errors = [], []
    for file in files:
        try:
            loaded.append(load_config(file))
        except UsageError as error:
            errors.append(error)
    _refuse(errors)
    owners: dict[tuple[str, str], Path] = {}
    for config in loaded:
        settings = config.experiment_set
        first = owners.setdefault((settings.output_root, settings.experiment_set_id), config.path)
        if first != config.path:
            raise UsageError(
                f"{first} and {config.path} both write to "
                f"{settings.output_root}/{settings.experiment_set_id}; give one another experiment_set_id"
            )
    return loaded


def _execute(
    loaded: "Sequence[LoadedConfig]",
    options: "RunOptions",
    *,
    inline: bool,
    as_json: bool = False,
    table: bool = False,
    mark: str | None = None,
    again: "Again | None" = None,
) -> None:
    """Do the work of each config, say what came out, and exit with the worst code.

    Where there are several, one that fails does not keep the next ones from being done.
    """
    from mllm_shapx.execution.options import Again
    from mllm_shapx.reporting.batch import BatchItem

    outcomes: list[StudyOutcome | ShapxError] = []
    items = [BatchItem(str(config.path), None) for config in loaded]
    request = _request()
    for number, config in enumerate(loaded):
        _say_how_to_go_on(request, loaded[number:], options)
        outcome, items[number] = _with_retries(config, options, again or Again(), request, inline=inline)
        outcomes.append(outcome)
        with _no_audience_needed(request):
            if not isinstance(outcome, ShapxError):
                _show(outcome, config, request, as_json=as_json, table=table, mark=mark)
            elif len(loaded) == 1:
                raise outcome
            else:
                say(f"error: {outcome}", err=True)
        if request.signal is not None and (outcome.exit_code > INTERRUPTED_FROM or config is not loaded[-1]):
            break
    with _no_audience_needed(request):
        _sum_up(items, outcomes, as_json=as_json)
    code = max((outcome.exit_code for outcome in outcomes), key=_severity)
    if request.signal is not None:
        if len(outcomes) < len(loaded):
            # One that was to be replaced and is begun goes on by another command than those after it.
            is_half_done = outcomes[-1].exit_code > INTERRUPTED_FROM and not options.overwrite
            left = loaded[len(outcomes) - is_half_done :]
            _say_how_to_go_on(request, left, options)
            _say_what_is_left(request, len(left))
            code = request.exit_code
        _leave(code)
    if code:
        sys.exit(code)


def _sum_up(
    items: "Sequence[BatchItem]", outcomes: "Sequence[StudyOutcome | ShapxError]", *, as_json: bool
) -> None:
    """Print the outcomes as data, or a table where there are several configs."""
    from mllm_shapx.reporting.batch import batch_table

    if as_json:
        data = [
            item.to_json() if isinstance(outcome, ShapxError) else outcome.to_json()
            for item, outcome in zip(
                items, outcomes, strict=False
            )  # a signal may have kept some from starting
        ]
        say_json(data[0] if len(data) == 1 else data)
    elif len(items) > 1:
        say(f"\n{batch_table(items)}")


def _with_retries(
    config: "LoadedConfig", options: "RunOptions", again: "Again", request: StopRequest, *, inline: bool
) -> "tuple[StudyOutcome | ShapxError, BatchItem]":
    """Return what became of a config, or its error, and the same for the table."""
    from mllm_shapx.execution.studies import run_config
    from mllm_shapx.reporting.batch import BatchItem
    from mllm_shapx.reporting.progress import ProgressReporter

    started = time.monotonic()
    interactive = None if config.experiment_set.runtime.progress_bar else False
    tries = 0
    while True:
        tries += 1
        found: StudyOutcome | ShapxError
        try:
            with ProgressReporter(sys.stderr, interactive) as reporter:
                found = run_config(config, options, reporter, inline=inline, request=request)
        except ShapxError as error:
            found = error
        # What the config or the directory forbids stays forbidden.
        for_good = isinstance(found, ConfigError | OutputError) or found.exit_code not in {1, 2}
        if for_good or request.signal is not None or tries > again.max_retries:
            break
        why = str(found) if isinstance(found, ShapxError) else "it stopped early"
        where = f"retry {tries} of {again.max_retries} in {again.retry_delay_s:g} s"
        say(f"{config.path}: {why}; {where}", err=True)
        time.sleep(again.retry_delay_s)
        if request.begun:
            options = replace(options, resume=True, overwrite=False)
    item = BatchItem(str(config.path), found.exit_code, tries=tries, seconds=time.monotonic() - started)
    if isinstance(found, ShapxError):
        return found, replace(item, error=str(found))
    return found, replace(item, done=sum(found.done.values()), total=sum(found.total.values()))


def _dry_run(loaded: "Sequence[LoadedConfig]", options: "RunOptions") -> None:
    """Say of each config what a run would do; write nothing, and exit with 2 when one would be refused."""
    from mllm_shapx.execution.preparation import check_output, prepare
    from mllm_shapx.reporting.standing import standing

    refused = False
    for config in loaded:
        try:
            study, warnings = prepare(config, options)
            check_output(study, options)
        except UsageError as error:
            refused = True
            say(f"{config.path}: would be refused: {error}")
            continue
        for warning in warnings:
            say(f"warning: {config.path}: {warning}", err=True)
        there = standing(study.output_uri, study.runs, study.rows, study.players)
        total = len(study.runs) * len(study.rows)
        kept = 0 if there is None or options.overwrite else there.samples_done + there.samples_failed
        say(
            f"{config.path}: would make {total - kept:,} of {total:,} samples, of {len(study.runs):,} run(s) "
            f"and {len(study.rows):,} row(s), in {study.output_uri}"
        )
    if refused:
        sys.exit(2)


def _show(
    outcome: "StudyOutcome",
    config: "LoadedConfig",
    request: StopRequest,
    *,
    as_json: bool,
    table: bool,
    mark: str | None,
) -> None:
    """Print what came out of one config."""
    for warning in outcome.warnings:
        say(f"warning: {warning}", err=True)
    if table:
        _show_table(config, outcome.output_uri, mark)
    if not as_json:
        say(outcome.to_text(request.go_on))


def _say_what_is_left(request: StopRequest, configs: int) -> None:
    with _no_audience_needed(request):
        say(f"{request.name}: {configs} config(s) left; to go on: {request.go_on}", err=True)


@contextlib.contextmanager
def _no_audience_needed(request: StopRequest) -> Iterator[None]:
    """Let nothing but the signal decide how a command ends whose terminal or pipe a signal has closed."""
    try:
        yield
    except OSError:
        if request.signal is None:
            raise


def _request() -> StopRequest:
    """Return what tells this command of signals."""
    found = click.get_current_context().find_object(StopRequest)
    return StopRequest() if found is None else found


def _say_how_to_go_on(request: StopRequest, left: "Sequence[LoadedConfig]", options: "RunOptions") -> None:
    """Note the commands that go on with the configs that are left."""
    request.begun = False
    if click.get_current_context().command.name == "retry":
        request.again = request.resume = _command(())
    else:
        begun = left[:1] if options.overwrite else left
        request.resume = _command(begun, verb="run", more=["--resume"])
        request.again = (
            _command(left, verb="run", more=["--overwrite"]) if options.overwrite else request.resume
        )


def _command(configs: "Sequence[LoadedConfig]", *, verb: str = "", more: Sequence[str] = ()) -> str:
    """Return the command under way as a user would type it for these configs, with further options."""
    context = click.get_current_context()
    words = ["mllm-shapx", verb or str(context.command.name)]
    for config in configs:
        words += ["--config", str(config.path)]
    words += more
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) != ParameterSource.COMMANDLINE or name in _NOT_REPEATED:
            continue
        value = context.params[name]
        option = max(parameter.opts, key=len)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter, click.Argument):
                words.append(str(item))
            else:
                words += [option] if item is True else [option, str(item)]
    return shlex.join(words)


def _severity(code: int) -> int:
    """Order exit codes: interrupted is worse than failed, failed worse than quarantined samples."""
    return {0: 0, 3: 1, 1: 2}.get(code, 3)


def _show_table(config: "LoadedConfig", directory: str, column: str | None) -> None:
    from mllm_shapx.data.sources import open_table
    from mllm_shapx.reporting.comparison import Mark
    from mllm_shapx.reporting.table import results_table, wants_color

    marks = {}
    table = open_table(config.experiment_set.dataset, config.path)
    if column is not None and column in table.columns:
        words = table.column(column)
        marks = {index: Mark(column, str(word)) for index, word in enumerate(words) if word is not None}
    say(results_table(directory, marks=marks, width=_width(), color=wants_color(sys.stdout)))


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _expanded(name: str, config_list: Path | None) -> list[Path]:
    from mllm_shapx.config.loading import resolve_path

    try:
        path = resolve_path(name, config_list)
    except ValueError as error:
        raise UsageError(f"--config: {error}") from error
    if not glob.has_magic(str(path)) or exists(path):
        return [path]
    found = sorted(matches(path))
    if not found:
        raise UsageError(f"no config file matches {name}")
    return found


def _list_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"--config-list {path}: cannot be read: {error.strerror}; name another file"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--config-list {path}: is not UTF-8 text (byte {error.start}); it takes one path a line"
        ) from error


def _foresee(loaded: "LoadedConfig", sweep: "Sweep", selection: "Selection") -> list[str]:
    """Return warnings of rows that cannot be explained or take very long; refuse runs without any other."""
    from mllm_shapx.records.storage import join_uri
    from mllm_shapx.reporting.outlook import Outlook

    settings = loaded.experiment_set
    uri = join_uri(settings.output_root, settings.experiment_set_id)
    outlook = Outlook(uri, sweep.runs, selection.rows, selection.players)
    try:
        outlook.refuse_hopeless(all_runs=False)
    except DatasetError as error:
        raise DatasetError(f"{loaded.path}: {error}") from error
    return outlook.warnings()


def _look_at_model(loaded: "LoadedConfig", sweep: "Sweep") -> str:
    from mllm_shapx.models.registry import check_model

    return check_model(sweep.runs[0].model_settings, loaded.path)


def _check_encoders(loaded: "LoadedConfig", sweep: "Sweep") -> None:
    """Refuse an external encoder that is not there; one that nobody can be asked for is warned of."""
    from mllm_shapx.models.identity import check_encoder

    for config in dict.fromkeys(run.embedding for run in sweep.runs):
        warning = None if config is None else check_encoder(config, loaded.path)
        if warning is not None:
            say(f"warning: {loaded.path}: {warning}", err=True)


def _warn(
    loaded: "LoadedConfig", sweep: "Sweep", selection: "Selection | None", foreseen: Sequence[str] = ()
) -> None:
    warnings = [
        *loaded.warnings,
        *sweep.warnings,
        *(() if selection is None else selection.warnings),
        *foreseen,
    ]
    for warning in warnings:
        say(f"warning: {loaded.path}: {warning}", err=True)


def _refuse(errors: Sequence[UsageError]) -> None:
    """Raise the errors of several configs as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UsageError("\n".join(str(error) for error in errors))


def _set_log_level(name: str) -> None:
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise UsageError(f'LOG_LEVEL is "{name}"; use DEBUG, INFO, WARNING or ERROR')
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger().setLevel(level)


def _put_source_first(folder: str) -> None:
    """Let mllm_shap be imported from a checkout; workers get the same from their environment."""
    if not folder:
        return
    try:
        path = expanded(folder)
    except ValueError as error:
        raise UsageError(f"MLLM_SHAP_SRC: {error}") from error
    if not exists(path) or not path.is_dir():
        raise UsageError(f"MLLM_SHAP_SRC names no directory: {folder}")
    sys.path.insert(0, str(real(path)))


if __name__ == "__main__":
    main(prog_name="mllm-shapx")
