"""Commands that do the work: run, demo, retry, rescore, merge, and removing stored answers."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mllm_shapx.cli.group import main
from mllm_shapx.cli.options import INLINE, ROWS, SECONDS, WORKERS, with_configs, with_resources, with_shard
from mllm_shapx.cli.reading import store
from mllm_shapx.config.files import load_configs
from mllm_shapx.errors import UsageError
from mllm_shapx.terminal import FilePath, Location, flag, number, say, say_json, warn, whole

if TYPE_CHECKING:
    from mllm_shapx.config.loading import LoadedConfig
    from mllm_shapx.execution.options import RunOptions


_EVENTS = flag("--json as_json", "Print events, one JSON object a line, and no words.")


@main.command()
@with_configs
@flag("--resume", "Skip what is done and go on with the rest.")
@flag("--overwrite", "Start again; old samples are moved aside, answers are reused.")
@flag(
    "--accept-changed-rows",
    "With --resume: explain rows again that were changed in the dataset; old samples are moved aside.",
)
@number("--max-samples", ROWS, "Explain at most so many rows.")
@with_shard
@with_resources
@number(
    "--max-retries",
    whole(0, 100, "for a study that fails so often needs a look"),
    "Times that a config that fails is tried again.",
    0,
)
@number("--retry-delay retry_delay_s", SECONDS, "Seconds before it is tried again.", 30.0)
@flag("--dry-run", "Say what would be done, and do nothing.")
@INLINE
@_EVENTS
@flag("--table", "Show some rows and all runs at the end.")
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
    from mllm_shapx.cli.several import Show, run_configs
    from mllm_shapx.execution.options import Again, RunOptions

    if options["resume"] and options["overwrite"]:
        raise UsageError("--resume and --overwrite exclude each other; give one of them")
    if options["accept_changed_rows"] and not options["resume"]:
        raise UsageError("--accept-changed-rows goes with --resume; give both")
    if as_json and table:
        raise UsageError("--json prints events and no table; leave out one of --json and --table")
    again = Again(options.pop("max_retries"), options.pop("retry_delay_s"))
    loaded, wanted = load_configs(configs), RunOptions(**options)
    if dry_run:
        _dry_run(loaded, wanted)
    else:
        run_configs(loaded, wanted, again, Show(as_json, table, mark), inline=inline)


def _dry_run(loaded: "Sequence[LoadedConfig]", options: "RunOptions") -> None:
    """Show for each config the work of a run; exit with 2 if one would be refused."""
    from mllm_shapx.execution.study_plan import dry_run

    refused = False
    for config in loaded:
        try:
            text, warnings = dry_run(config, options)
        except UsageError as error:
            refused = True
            say(f"{config.path}: would be refused: {error}")
            continue
        warn(config.path, warnings)
        say(f"{config.path}: {text}")
    if refused:
        sys.exit(2)


@main.command()
@click.option("--config", "config", type=FilePath(), default="configs/demo.json", help="Config of the demo.")
@number("--num-workers", WORKERS, "Workers on the CPU.", 2)
@INLINE
def demo(config: Path, num_workers: int, inline: bool) -> None:
    """Explain the rows that the repository ships with the model that it ships."""
    from mllm_shapx.cli.several import Show, run_configs
    from mllm_shapx.execution.options import Again, RunOptions

    if not config.is_file():
        raise UsageError(f"{config} is not there; run this in a checkout of the repository, or give --config")
    options = RunOptions(overwrite=True, num_workers=num_workers)
    shown = Show(table=True, mark="planted_word")
    run_configs(load_configs([config]), options, Again(), shown, inline=inline)


@main.command()
@click.argument("directory", type=Location(), required=False)
@click.option("--config", type=FilePath(), help="Config of the set; the shards' copy of it by default.")
@flag("--json as_json", "Print the outcome as data.")
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
@click.option("--only", "reasons", multiple=True, metavar="REASON", help="Only failures of this reason.")
@with_resources
@INLINE
@_EVENTS
def retry(directory: str, reasons: Sequence[str], *, inline: bool, as_json: bool, **options: Any) -> None:
    """Try the samples again that were given up, and nothing else."""
    from mllm_shapx.cli.several import Show, run_configs
    from mllm_shapx.execution.options import Again, RunOptions
    from mllm_shapx.execution.preparation import study_config
    from mllm_shapx.reporting.failures import failures

    rows = failures(directory, reasons=reasons).rows_by_run()
    if not rows:
        say(f"{directory}: no sample to try again", err=as_json)
        return
    loaded = load_configs([study_config(directory)])
    wanted = RunOptions(resume=True, retry_rows=rows, **options)
    run_configs(loaded, wanted, Again(), Show(as_json), inline=inline)


@main.command()
@with_configs
@flag("--overwrite", "Compute all samples again; old ones are moved aside.")
@number("--max-samples", ROWS, "Take at most so many rows.")
@_EVENTS
def rescore(configs: Sequence[Path], overwrite: bool, max_samples: int | None, as_json: bool) -> None:
    """Compute runs from stored answers alone, without loading the model."""
    from mllm_shapx.cli.several import Show, run_configs
    from mllm_shapx.execution.options import Again, RunOptions
    from mllm_shapx.execution.rescoring import rescore_config

    options = RunOptions(resume=not overwrite, overwrite=overwrite, max_samples=max_samples)
    run_configs(load_configs(configs), options, Again(), Show(as_json), instead=rescore_config)


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
