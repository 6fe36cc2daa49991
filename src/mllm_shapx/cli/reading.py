"""Commands that read a study's directory: status, failures, store, verify, report, compare, export."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mllm_shapx.cli.group import main
from mllm_shapx.cli.options import ANSWERS, REPLACE, TABLE_FORM
from mllm_shapx.terminal import FilePath, Location, Number, flag, number, say, say_json, show, whole

if TYPE_CHECKING:
    from mllm_shapx.reporting.output import TableForm

_MEGABYTES = Number(0, 1000, "since browsers do not open larger pages")


@main.command()
@click.argument("directory", type=Location())
@flag("--check", "Read every sample; exit code 1 when one is damaged.")
@flag("--watch", "Look again every few seconds, until nobody works on it.")
@flag("--json as_json", "Print the status as data; with --watch, one line each.")
def status(directory: str, check: bool, watch: bool, as_json: bool) -> None:
    """Say how far a study is, from its files alone."""
    from mllm_shapx.reporting.status import status as read_status

    look = functools.partial(read_status, directory, check=check)
    if watch:
        from mllm_shapx.reporting.watch import watch as watch_status

        found = watch_status(look, sys.stdout, as_json=as_json)
    else:
        found = look()
        show(found.to_json, found.to_text, as_json=as_json)
    if found.damaged:
        sys.exit(1)


@main.command()
@click.argument("directory", type=Location())
@click.option("--reason", "reasons", multiple=True, help="Only failures of this reason; may be repeated.")
@flag("--json as_json", "Print the failures as data.")
def failures(directory: str, reasons: Sequence[str], as_json: bool) -> None:
    """List the samples that were given up, and why."""
    from mllm_shapx.reporting.failures import failures as read_failures

    found = read_failures(directory, reasons=reasons)
    show(found.to_json, found.to_text, as_json=as_json)


@main.group()
def store() -> None:
    """Look after the answers that are kept for other runs."""


@store.command("info")
@click.argument("directory", type=Location())
@flag("--json as_json", "Print it as data.")
def store_info(directory: str, as_json: bool) -> None:
    """Say what answers a study keeps."""
    from mllm_shapx.reporting.stored import stored

    found = stored(directory)
    show(found.to_json, found.to_text, as_json=as_json)


@store.command("export")
@click.argument("directory", type=Location())
@TABLE_FORM
@click.option("--output", type=FilePath(), help="The file; SET_coalitions.FORMAT in the working directory.")
@REPLACE
def store_export(directory: str, form: "TableForm", output: Path | None, overwrite: bool) -> None:
    """Write one table of all answers: a line for each coalition of every row, with its values."""
    from mllm_shapx.execution.store_export import export_store

    say(export_store(directory, form, output, overwrite=overwrite).to_text())


@main.command()
@click.argument("directories", nargs=-1, required=True, type=Location(), metavar="DIRECTORY...")
@click.option(
    "--again",
    type=ANSWERS,
    metavar="N",
    help="Load the model, generate N random stored answers again, one at a time, and compare them.",
)
@number("--seed", whole(0, 2**32 - 1, "which is the largest seed"), "Which answers --again draws.", 0)
@flag("--json as_json", "Print the findings as data.")
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
    "--figures",
    type=FilePath(),
    metavar="FOLDER",
    help="Write the plots (SVG, PDF) and the errors (CSV, LaTeX) into this folder.",
)
@click.option("--audio-limit", type=_MEGABYTES, default=15, metavar="MB", help="Recordings in the page.")
@flag("--accept-changed-rows", "Show samples of rows that were changed in the dataset too.")
def report(
    directory: str, output: Path | None, figures: Path | None, audio_limit: float, accept_changed_rows: bool
) -> None:
    """Write an HTML page of a study: tables, plots, prompts with their values.

    With --figures, the page is written only where --output names it.
    """
    if figures is not None:
        from mllm_shapx.reporting.figures import write_figures

        for path in write_figures(directory, figures, accept_changed_rows=accept_changed_rows):
            say(path)
        if output is None:
            return
    from mllm_shapx.reporting.html import PageSettings
    from mllm_shapx.reporting.html import report as write_report

    settings = PageSettings(most_sound=int(audio_limit * 1e6))
    say(write_report(directory, output, settings=settings, accept_changed_rows=accept_changed_rows))


@main.command()
@click.argument("directories", nargs=-1, required=True, type=Location(), metavar="DIRECTORY...")
@number(
    "--top-k",
    whole(1, 1000, "which is more than prompts have"),
    "How many players count as the most important ones.",
    3,
)
@flag("--json as_json", "Print the comparison as data.")
@click.option(
    "--html", "output", type=FilePath(), help="Write a page with the runs of each row side by side."
)
def compare(directories: Sequence[str], top_k: int, as_json: bool, output: Path | None) -> None:
    """Compare the first run with the others, on the rows that they share.

    Runs may be of different sets and models. An experiment set's directory stands for all its runs.
    """
    from mllm_shapx.reporting.compare import compare as compare_runs
    from mllm_shapx.reporting.output import refuse_inside, refuse_special, write_output
    from mllm_shapx.reporting.reading import open_study

    if output is not None:
        refuse_special(output)
        for directory in directories:
            refuse_inside(open_study(directory).storage, output)
    found = compare_runs(directories, top_k)
    show(found.to_json, found.to_text, as_json=as_json)
    if output is not None:
        write_output(output, found.to_html().encode(errors="replace"))
        say(output, err=as_json)


@main.command()
@click.argument("directory", type=Location())
@TABLE_FORM
@click.option("--output", type=FilePath(), help="The file; named after the set, in the working directory.")
@REPLACE
def export(directory: str, form: "TableForm", output: Path | None, overwrite: bool) -> None:
    """Write one table of all values: a line for each player of every sample."""
    from mllm_shapx.reporting.export import export as write_export

    say(write_export(directory, form, output, overwrite=overwrite).to_text())
