"""The command `slurm`: prints or submits the batch script that runs configs."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mllm_shapx.cli.group import main
from mllm_shapx.cli.options import NODES, SHARD, SHARDS, is_given, with_configs
from mllm_shapx.cli.running import run
from mllm_shapx.config.files import load_configs
from mllm_shapx.errors import UsageError
from mllm_shapx.terminal import flag, number, say, whole

_OWNED_BY_SLURM = {"named", "config_list", "more", "resume", "overwrite", "address", "nodes", *SHARD}
"""Options of `run` that the batch script sets itself."""


@main.command()
@with_configs
@click.option("--time", required=True, metavar="LIMIT", help="Time limit, such as 12:00:00 or 2-00:00:00.")
@number("--nodes", NODES, "Nodes of the job.", 1)
@number("--gpus-per-node", whole(0, 64, "and no node has more"), "GPUs.", 0)
@number("--cpus-per-node", whole(1, 4096, "and no node has more"), "CPUs; 4 for each GPU by default.")
@number("--array shards", SHARDS, "Make a job array of so many shards, for `mllm-shapx merge`.")
@number(
    "--drain-before drain_before_s",
    whole(30, 65_535, "and Slurm takes no larger value"),
    "Seconds before the time limit at which the study drains and the job is requeued.",
    120,
)
@click.option("--module", "modules", multiple=True, help="Environment module to load; may be repeated.")
@click.option("--venv", help="Virtual environment to activate; the one of this command by default.")
@click.option("--setup", help="Shell file to source after it.")
@click.option("--job-name", "name", help="Name of the job and its log; the config's by default.")
@click.option("--sbatch", multiple=True, metavar="OPTION", help="Other option of sbatch; may be repeated.")
@click.option(
    "--run-options",
    default="",
    show_default=False,
    metavar="TEXT",
    help='Options of `run`, such as "--workers-per-gpu 2".',
)
@flag("--submit submits", "Submit the script instead of printing it.")
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
    """Return the words of --run-options, checked by `run`."""
    try:
        words = shlex.split(text)
        with run.make_context("run", list(words)) as context:
            given = {name for name in context.params if is_given(context, name)}
    except (ValueError, click.UsageError) as error:
        said = error.format_message() if isinstance(error, click.UsageError) else error
        raise UsageError(f"--run-options {text!r}: {said}") from error
    if owned := given & _OWNED_BY_SLURM:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(owned))
        raise UsageError(
            f"--run-options {text!r}: {names} cannot be given here, for the script sets it itself"
        )
    return tuple(words)
