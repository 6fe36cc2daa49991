"""Options of several commands, and the bounds of their numbers."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mllm_shapx.config.files import config_files
from mllm_shapx.errors import UsageError
from mllm_shapx.terminal import Command, FilePath, Number, flag, number, whole

if TYPE_CHECKING:
    from mllm_shapx.records.shards import Shard

YEAR = (31_536_000, "which is a year")
ROWS = whole(1, 1_000_000_000, "and no dataset that is taken has as many rows")
WORKERS = whole(1, 10_000, "and one coordinator serves no more")
SHARDS = whole(1, 10_000, "and no site takes larger job arrays")
NODES = whole(1, 10_000, "and no Ray cluster has more")
ANSWERS = whole(1, 1_000_000_000, "and no study stores as many answers")
ROWS_IN_FLIGHT = whole(1, 4096, "for a worker holds the answers of all of them in memory")
SECONDS = Number(0, *YEAR)

_WORKERS_PER_GPU = whole(1, 64, "for each worker holds a model of its own")
_GPUS_PER_WORKER = Number(0, 1024, "and no machine has more", above=True)
_ATTEMPTS = whole(1, 1000, "for each attempt takes a worker down")
_REQUESTS = whole(1, 10**12, "and no server answers as many")
_TOKENS = whole(1, 10**15, "and no server answers as many")
_STALL = Number(1, *YEAR)
_FLUSH = Number(0.1, *YEAR)

SHARD = ("shard", "shard_index", "num_shards")
"""Parameters of `with_shard`."""


class _Gpus(Number):
    """A number of GPUs, or `all`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the word `all`."""
        return value if value == "all" else super().convert(value, param, ctx)


def with_configs(command: Command) -> Command:
    """Give a command its config files as `configs`: a non-empty tuple of distinct paths."""

    @click.option(
        "--config", "named", multiple=True, metavar="FILE...", help="Config file or glob; may be repeated."
    )
    @click.option(
        "--config-list", type=FilePath(), metavar="FILE", help="File that names config files, one a line."
    )
    @click.argument("more", nargs=-1, metavar="")
    @functools.wraps(command)
    def wrapped(named: Sequence[str], config_list: Path | None, more: Sequence[str], **options: Any) -> None:
        command(configs=config_files([*named, *more], config_list), **options)

    return wrapped


def is_given(context: click.Context, name: str) -> bool:
    """Return whether the user wrote an option or argument."""
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE


INLINE = flag("--inline", "Do the work in this process, without Ray.")
TABLE_FORM = click.option(
    "--format", "form", type=click.Choice(["csv", "parquet"]), required=True, help="What to write."
)
REPLACE = flag("--overwrite", "Replace a file that is there.")


def _matches(pattern: str, wanted: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """Return a callback that refuses other values; `wanted` ends its message."""

    def check(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise click.BadParameter(f"{value[:60]!r} is {wanted}")
        return value

    return check


_RESOURCES = (
    click.option(
        "--num-gpus",
        type=_Gpus(0, 100_000, "and no cluster has more"),
        metavar="N|all",
        help="GPUs to use; all there are by default.",
    ),
    number("--num-workers", WORKERS, "Workers; one per GPU by default."),
    number("--workers-per-gpu", _WORKERS_PER_GPU, "Workers that share one GPU.", 1),
    number("--gpus-per-worker", _GPUS_PER_WORKER, "GPUs of one worker."),
    number(
        "--rows-in-flight",
        ROWS_IN_FLIGHT,
        "Rows that one worker explains side by side; 2 or more, to fill batches, by default.",
    ),
    click.option("--address", help="Ray cluster to join; RAY_ADDRESS, else one on this machine, by default."),
    number("--wait-for-nodes nodes", NODES, "Nodes that the Ray cluster must have first.", 1),
    number(
        "--max-attempts",
        _ATTEMPTS,
        "Tries of a row that fails or ends its worker, before it is quarantined.",
        3,
    ),
    flag("--fail-fast", "Stop at the first quarantined sample."),
    click.option(
        "--max-failures",
        metavar="N|F%",
        callback=_matches(
            r"[0-9]{1,10}|([0-9]{1,2}(\.[0-9]{1,9})?|100)%",
            "neither a number of samples of at most 10 digits nor a percentage such as 5%",
        ),
        help="Stop when more are quarantined.",
    ),
    number(
        "--stall-timeout stall_s",
        _STALL,
        "Seconds without progress after which a worker is replaced.",
        1800.0,
    ),
    number(
        "--server-patience server_patience_s",
        SECONDS,
        "Seconds without any answer of a model's server after which the study stops.",
        600.0,
    ),
    number("--max-requests", _REQUESTS, "Stop before a model's server gets more requests than this."),
    number(
        "--max-tokens", _TOKENS, "Stop before prompts and answers take more tokens of a server than this."
    ),
    number(
        "--flush-every flush_s", _FLUSH, "Seconds after which answers of a long row are written out.", 30.0
    ),
    number(
        "--grace grace_s", SECONDS, "Seconds that rows under way get after the first SIGINT or SIGTERM.", 30.0
    ),
)

_SHARD = (
    click.option(
        "--shard",
        metavar="I/N",
        callback=_matches(r"[0-9]{1,4}/[0-9]{1,5}", "not I/N, such as 0/4 for the first of four shards"),
        help="Explain every N-th row from row I on (0 to N-1), for `merge` to join.",
    ),
    number("--shard-index", whole(0, 9_999, "and there are fewer shards"), "I of --shard I/N."),
    number("--num-shards", SHARDS, "N of --shard I/N."),
)


def with_resources(command: Command) -> Command:
    """Give a command the options for the place of the work and its limits."""
    return _with(_RESOURCES, command)


def with_shard(command: Command) -> Command:
    """Give a command the options that name a shard, and the shard as `shard`."""

    @functools.wraps(command)
    def wrapped(shard: str | None, shard_index: int | None, num_shards: int | None, **options: Any) -> None:
        command(shard=_shard_of(shard, shard_index, num_shards), **options)

    return _with(_SHARD, wrapped)


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    return functools.reduce(lambda done, option: option(done), reversed(options), command)


def _shard_of(text: str | None, index: int | None, count: int | None) -> "Shard | None":
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
