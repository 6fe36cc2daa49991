"""The command that goes on with a study, as it is said after a signal."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.terminal import say

if TYPE_CHECKING:
    from mllm_shapx.config.loading import LoadedConfig

_NOT_REPEATED = {"config", "configs", "named", "config_list", "more", "resume", "overwrite"}
"""Options that the command that goes on does not repeat as they are."""


def stop_request() -> StopRequest:
    """Return what tells this command of signals."""
    found = click.get_current_context().find_object(StopRequest)
    return StopRequest() if found is None else found


def note_left(request: StopRequest, left: "Sequence[LoadedConfig]", *, overwrite: bool = False) -> None:
    """Note the commands that go on with the configs that are left.

    Args:
        request: Keeps the commands.
        left: The configs; the first one may be under way.
        overwrite: Whether samples are replaced: a config that has not begun needs the same option again.
    """
    request.begun = False
    command = click.get_current_context().command.name
    if command == "retry":
        request.again = request.resume = _command(())
    elif command == "rescore":
        request.again = request.resume = _command(left)
    else:
        begun = left[:1] if overwrite else left
        request.resume = _command(begun, verb="run", more=["--resume"])
        request.again = _command(left, verb="run", more=["--overwrite"]) if overwrite else request.resume


def say_what_is_left(request: StopRequest, configs: int) -> None:
    """Say after a signal how many configs are left, and the command that does them."""
    with no_audience_needed(request):
        say(f"{request.name}: {configs} config(s) left; to go on: {request.go_on}", err=True)


@contextlib.contextmanager
def no_audience_needed(request: StopRequest) -> Iterator[None]:
    """After a signal, ignore that the terminal or pipe is closed: the signal decides the exit code."""
    try:
        yield
    except OSError:
        if request.signal is None:
            raise


def _command(configs: "Sequence[LoadedConfig]", *, verb: str = "", more: Sequence[str] = ()) -> str:
    """Return the running command as a user would type it for these configs, with further options."""
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
