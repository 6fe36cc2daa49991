"""The command that continues a study, shown after a signal."""

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
"""Options that the continuing command does not repeat unchanged."""


def stop_request() -> StopRequest:
    """Return this command's signal handler."""
    found = click.get_current_context().find_object(StopRequest)
    return StopRequest() if found is None else found


def is_given(context: click.Context, name: str) -> bool:
    """Return whether the user wrote an option or argument."""
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE


def note_left(request: StopRequest, left: "Sequence[LoadedConfig]", *, overwrite: bool = False) -> None:
    """Store the commands that continue with the remaining configs.

    Args:
        request: Stores the commands.
        left: The remaining configs; the first one may be running.
        overwrite: Whether to replace samples: a config that has not begun needs the option again.
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
    """After a signal, show the number of remaining configs and the command for them."""
    with no_audience_needed(request):
        say(f"{request.name}: {configs} config(s) left; to go on: {request.go_on}", err=True)


@contextlib.contextmanager
def no_audience_needed(request: StopRequest) -> Iterator[None]:
    """After a signal, ignore a closed terminal or pipe: the signal decides the exit code."""
    try:
        yield
    except OSError:
        if request.signal is None:
            raise


def _command(configs: "Sequence[LoadedConfig]", *, verb: str = "", more: Sequence[str] = ()) -> str:
    """Return the running command for these configs as a user would type it, with further options."""
    context = click.get_current_context()
    words = ["mllm-shapx", verb or str(context.command.name)]
    for config in configs:
        words += ["--config", str(config.path)]
    words += more
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _NOT_REPEATED or not is_given(context, name):
            continue
        value = context.params[name]
        option = max(parameter.opts, key=len)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter, click.Argument):
                words.append(str(item))
            else:
                words += [option] if item is True else [option, str(item)]
    return shlex.join(words)
