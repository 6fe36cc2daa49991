"""Does the work of a call's configs, one after another, and says how to go on after a signal."""

import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import click

from mllm_shapx.cli.group import leave
from mllm_shapx.cli.options import is_given
from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.errors import ShapxError
from mllm_shapx.execution.batch import ConfigResult, run_with_retries, worst
from mllm_shapx.execution.options import Again, RunOptions
from mllm_shapx.execution.outcome import StudyOutcome
from mllm_shapx.execution.signals import StopRequest
from mllm_shapx.reporting.batch import BatchItem, batch_table
from mllm_shapx.reporting.events import Events
from mllm_shapx.reporting.progress import ProgressReporter
from mllm_shapx.terminal import say, terminal_width

_NOT_REPEATED = {"config", "configs", "named", "config_list", "more", "resume", "overwrite"}
"""Options that the continuing command does not repeat unchanged."""


@dataclass(frozen=True, slots=True)
class Show:
    """Choice of the output."""

    as_json: bool = False
    """Whether to print events for programs instead of text."""
    table: bool = False
    """Whether to show some rows and all runs."""
    mark: str | None = None
    """With `table`: the dataset column whose word is ranked."""


type Work = Callable[[LoadedConfig, RunOptions, ProgressReporter, StopRequest], StudyOutcome]
"""What is done with a config."""


def run_configs(
    loaded: Sequence[LoadedConfig],
    options: RunOptions,
    again: Again,
    show: Show,
    *,
    inline: bool = False,
    instead: Work | None = None,
) -> None:
    """Run each config, or do `instead` with it, print the results, and exit with the worst code.

    A failing config does not stop the next ones.

    Raises:
        ShapxError: The error of the only config.
    """
    from mllm_shapx.execution.kept import Kept
    from mllm_shapx.execution.run import run_config

    results: list[ConfigResult] = []
    request = click.get_current_context().find_object(StopRequest) or StopRequest()
    events = Events(sys.stdout) if show.as_json else None
    with Kept(workers=len(loaded) > 1) as kept:

        def run_one(
            config: LoadedConfig, options: RunOptions, reporter: ProgressReporter, request: StopRequest
        ) -> StudyOutcome:
            return run_config(config, options, reporter, inline=inline, request=request, kept=kept)

        for number, config in enumerate(loaded):
            _note_left(request, loaded[number:], overwrite=options.overwrite)
            result = _result(config, options, again, request, instead or run_one, events=events)
            results.append(result)
            with _no_audience_needed(request):
                _show_result(result, config, request, show, events=events, alone=len(loaded) == 1)
            if request.signal is not None and (result.is_interrupted or config is not loaded[-1]):
                break
    with _no_audience_needed(request):
        if len(loaded) > 1 and events is None:
            _print_summary(loaded, results)
    code = worst(result.exit_code for result in results)
    if request.signal is not None:
        if len(results) < len(loaded):
            # With --overwrite, the interrupted config needs another command than those after it.
            is_half_done = results[-1].is_interrupted and not options.overwrite
            left = loaded[len(results) - is_half_done :]
            _note_left(request, left, overwrite=options.overwrite)
            with _no_audience_needed(request):
                say(f"{request.name}: {len(left)} config(s) left; to go on: {request.go_on}", err=True)
            code = request.exit_code
        leave(code)
    if code:
        sys.exit(code)


def _result(
    config: LoadedConfig,
    options: RunOptions,
    again: Again,
    request: StopRequest,
    do: Work,
    *,
    events: Events | None,
) -> ConfigResult:
    interactive = None if config.experiment_set.runtime.progress_bar else False

    def work(options: RunOptions) -> StudyOutcome:
        with contextlib.ExitStack() as stack:
            if events is not None:
                set_id = config.experiment_set.experiment_set_id
                events.write("started", config=str(config.path), experiment_set_id=set_id)
                # Prints of libraries are no events.
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            reporter = stack.enter_context(ProgressReporter(sys.stderr, interactive, events=events))
            return do(config, options, reporter, request)

    tell = functools.partial(say, err=True)
    return run_with_retries(work, config, options=options, again=again, request=request, tell=tell)


def _show_result(
    result: ConfigResult,
    config: LoadedConfig,
    request: StopRequest,
    show: Show,
    *,
    events: Events | None,
    alone: bool,
) -> None:
    found = result.found
    if isinstance(found, ShapxError):
        if events is not None:
            events.write("error", **_item(config, result).to_json())
        if alone:
            raise found
        say(f"error: {found}", err=True)
        return
    if events is not None:
        said = {"warnings": found.warnings, "hints": found.hints}
        events.write("outcome", config=str(config.path), **found.to_json(), **said)
    for warning in found.warnings:
        say(f"warning: {warning}", err=True)
    if show.table:
        _print_table(config, found.output_uri, show.mark)
    if events is None:
        for line in (found.to_text(request.go_on), *found.hints):
            say(line)


def _print_table(config: LoadedConfig, directory: str, column: str | None) -> None:
    from mllm_shapx.data.sources import open_table
    from mllm_shapx.reporting.comparison import Mark
    from mllm_shapx.reporting.table import results_table, wants_color

    marks = {}
    table = open_table(config.experiment_set.dataset, config.path)
    if column is not None and column in table.columns:
        words = table.column(column)
        marks = {index: Mark(column, str(word)) for index, word in enumerate(words) if word is not None}
    # Not with `say`, which would write its colours out as text.
    color = wants_color(sys.stdout)
    click.echo(results_table(directory, marks=marks, width=terminal_width(), color=color))


def _print_summary(loaded: Sequence[LoadedConfig], results: Sequence[ConfigResult]) -> None:
    # After a signal, some configs may not have started.
    items = [_item(config, result) for config, result in zip(loaded, results, strict=False)]
    items += [BatchItem(str(config.path), None) for config in loaded[len(results) :]]
    say(f"\n{batch_table(items)}")


def _item(config: LoadedConfig, result: ConfigResult) -> BatchItem:
    found = result.found
    item = BatchItem(str(config.path), result.exit_code, tries=result.tries, seconds=result.seconds)
    if isinstance(found, ShapxError):
        return replace(item, error=str(found))
    return replace(item, done=sum(found.done.values()), total=sum(found.total.values()))


def _note_left(request: StopRequest, left: Sequence[LoadedConfig], *, overwrite: bool = False) -> None:
    """Store in `request` the commands that continue with the configs in `left`; the first one may be running.

    A config that has not begun needs `--overwrite` again.
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


@contextlib.contextmanager
def _no_audience_needed(request: StopRequest) -> Iterator[None]:
    """After a signal, ignore a closed terminal or pipe: the signal decides the exit code."""
    try:
        yield
    except OSError:
        if request.signal is None:
            raise


def _command(configs: Sequence[LoadedConfig], *, verb: str = "", more: Sequence[str] = ()) -> str:
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
