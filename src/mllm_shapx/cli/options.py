"""Options of several commands, and the bounds of their numbers."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mllm_shapx.config.files import config_files
from mllm_shapx.errors import UsageError
from mllm_shapx.terminal import FilePath, Number, whole

if TYPE_CHECKING:
    from mllm_shapx.records.shards import Shard

ROWS = whole(1, 1_000_000_000, "and no dataset that is taken has as many rows")
WORKERS = whole(1, 10_000, "and one coordinator serves no more")
SHARDS = whole(1, 10_000, "and no site takes larger job arrays")
NODES = whole(1, 10_000, "and no Ray cluster has more")
ANSWERS = whole(1, 1_000_000_000, "and no study stores as many answers")
ROWS_IN_FLIGHT = whole(1, 4096, "for a worker holds the answers of all of them in memory")
YEAR_S, A_YEAR = 31_536_000, "which is a year"

SHARD = ("shard", "shard_index", "num_shards")
"""Parameters of `with_shard`, in the order of `shard_of`."""


class _Gpus(Number):
    """A number of GPUs, or `all`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the word `all`."""
        return value if value == "all" else super().convert(value, param, ctx)


def with_configs(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its config files as `configs`: a non-empty tuple of distinct paths."""

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


TABLE_FORM = click.option(
    "--format", "form", type=click.Choice(["csv", "parquet"]), required=True, help="What to write."
)
REPLACE = click.option("--overwrite", is_flag=True, help="Replace a file that is there.")


def with_resources(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options for the place of the work and its limits."""
    options = (
        click.option(
            "--num-gpus",
            type=_Gpus(0, 100_000, "and no cluster has more"),
            metavar="N|all",
            help="GPUs to use; all there are by default.",
        ),
        click.option("--num-workers", type=WORKERS, help="Workers; one per GPU by default."),
        click.option(
            "--workers-per-gpu",
            type=whole(1, 64, "for each worker holds a model of its own"),
            default=1,
            show_default=True,
            help="Workers that share one GPU.",
        ),
        click.option(
            "--gpus-per-worker",
            type=Number(0, 1024, "and no machine has more", above=True),
            help="GPUs of one worker.",
        ),
        click.option(
            "--rows-in-flight",
            type=ROWS_IN_FLIGHT,
            help="Rows that one worker explains side by side; 2 or more, to fill batches, by default.",
        ),
        click.option(
            "--address", help="Ray cluster to join; RAY_ADDRESS, else one on this machine, by default."
        ),
        click.option(
            "--wait-for-nodes",
            "nodes",
            type=NODES,
            default=1,
            help="Nodes that the Ray cluster must have first.",
        ),
        click.option(
            "--max-attempts",
            type=whole(1, 1000, "for each attempt takes a worker down"),
            default=3,
            show_default=True,
            help="Tries of a row that fails or ends its worker, before it is quarantined.",
        ),
        click.option("--fail-fast", is_flag=True, help="Stop at the first quarantined sample."),
        click.option(
            "--max-failures", metavar="N|F%", callback=_failure_limit, help="Stop when more are quarantined."
        ),
        click.option(
            "--stall-timeout",
            "stall_s",
            type=Number(1, YEAR_S, A_YEAR),
            default=1800.0,
            show_default=True,
            help="Seconds without progress after which a worker is replaced.",
        ),
        click.option(
            "--server-patience",
            "server_patience_s",
            type=Number(0, YEAR_S, A_YEAR),
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
            type=Number(0.1, YEAR_S, A_YEAR),
            default=30.0,
            show_default=True,
            help="Seconds after which answers of a long row are written out.",
        ),
        click.option(
            "--grace",
            "grace_s",
            type=Number(0, YEAR_S, A_YEAR),
            default=30.0,
            show_default=True,
            help="Seconds that rows under way get after the first SIGINT or SIGTERM.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def with_shard(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name a shard; `shard_of` reads them."""
    options = (
        click.option(
            "--shard",
            metavar="I/N",
            callback=_shard_text,
            help="Explain every N-th row from row I on (0 to N-1), for `merge` to join.",
        ),
        click.option(
            "--shard-index", type=whole(0, 9_999, "and there are fewer shards"), help="I of --shard I/N."
        ),
        click.option("--num-shards", type=SHARDS, help="N of --shard I/N."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _shard_text(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9]{1,4}/[0-9]{1,5}", value):
        raise click.BadParameter(f"{value[:60]!r} is not I/N, such as 0/4 for the first of four shards")
    return value


def shard_of(text: str | None, index: int | None, count: int | None) -> "Shard | None":
    """Return a call's shard.

    Raises:
        UsageError: When it is given twice or in part, or I is not below N.
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
