"""Option types, output and unexpected errors of the command line."""

import json
import logging
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from mllm_shapx.config.paths import expanded, location
from mllm_shapx.errors import first_of
from mllm_shapx.plaintext import printable, printable_json, redacted, shown

UNEXPECTED = 1
"""Exit code after an unexpected error."""

_LIBRARIES = ("mllm-shapx", "mllm-shap", "click", "numpy", "pyarrow", "pydantic", "torch", "transformers")


class Number(click.ParamType[float]):
    """A finite number between two bounds.

    Args:
        least: Smallest allowed value.
        most: Largest allowed value.
        why: Effect of a larger value; part of the message.
        whole: Whether only whole numbers are allowed.
        above: Whether `least` itself is refused.
    """

    def __init__(
        self, least: float, most: float, why: str, *, whole: bool = False, above: bool = False
    ) -> None:
        self.name = "integer" if whole else "number"
        self._least, self._most, self._why = least, most, why
        self._whole, self._above = whole, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        kind = int if self._whole else float
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            wanted = "whole number" if self._whole else "number"
            self.fail(f"{printable(str(value)[:60])!r} is not a {wanted}.", param, ctx)
        if math.isnan(number):
            self.fail("NaN is not a number.", param, ctx)
        if number < self._least or (self._above and number == self._least):
            wanted = "more than" if self._above else "at least"
            self.fail(f"{value} is too small: it must be {wanted} {self._least:,}.", param, ctx)
        if number > self._most:
            self.fail(f"{str(value)[:60]} is too large: at most {self._most:,}, {self._why}.", param, ctx)
        return number


def whole(least: int, most: int, why: str) -> Number:
    """Return the type of a whole number from `least` to `most`; `why` is the reason for `most`."""
    return Number(least, most, why, whole=True)


type Command = Callable[..., None]


def number(names: str, kind: Number, text: str, default: float | None = None) -> Callable[[Command], Command]:
    """Return an option that takes a number; `names` are those on the command line and of the parameter."""
    return click.option(*names.split(), type=kind, default=default, help=text)


def flag(names: str, text: str) -> Callable[[Command], Command]:
    """Return an option that is on or off."""
    return click.option(*names.split(), is_flag=True, help=text)


class Location(click.ParamType[str]):
    """A directory or URI, `~` expanded, as text."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the path or URI."""
        try:
            return location(str(value))
        except ValueError as error:
            self.fail(shown(str(error)), param, ctx)


class FilePath(click.ParamType[Path]):
    """A local path, `~` expanded."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        try:
            return expanded(str(value))
        except ValueError as error:
            self.fail(shown(str(error)), param, ctx)


def say(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print text from files, data or models: escapes written out, logins hidden."""
    click.echo(shown(str(text)), err=err, nl=nl)


def say_json(data: Any) -> None:
    """Print data as one readable JSON value."""
    click.echo(printable_json(redacted(json.dumps(data, indent=2, ensure_ascii=False))))


def show(data: Callable[[], Any], text: Callable[[int], str], *, as_json: bool) -> None:
    """Print what a command found: its `to_json`, or its `to_text` at the terminal's width."""
    if as_json:
        say_json(data())
    else:
        say(text(terminal_width()), nl=False)


def warn(config: Path, warnings: Sequence[str]) -> None:
    """Print the warnings of a config."""
    for warning in warnings:
        say(f"warning: {config}: {warning}", err=True)


def make_streams_safe() -> None:
    """Write characters outside an output's encoding as escapes instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def report_unexpected(error: BaseException) -> None:
    """Report an unexpected error in one line, with the traceback's file.

    The file is in the temporary directory, readable only by this user. With LOG_LEVEL=DEBUG the traceback is
    shown too.
    """
    first = first_of(error)
    words = " ".join(shown(str(first)).split())[:300]
    what = f"{type(first).__name__}: {words}" if words else type(first).__name__
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        say("".join(traceback.format_exception(error)), err=True, nl=False)
    try:
        place = f"the traceback is in {_write_report(error)}"
    except OSError as failure:
        place = f"no report could be written ({failure.strerror}); LOG_LEVEL=DEBUG shows the traceback"
    say(f"error: unexpected {what}; this is a fault of the program. {place[0].upper()}{place[1:]}", err=True)


def _write_report(error: BaseException) -> str:
    # mkstemp makes a file that only this user can read.
    handle, path = tempfile.mkstemp(prefix="mllm-shapx-error-", suffix=".txt")
    versions = []
    for name in _LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    lines = [
        time.strftime("%Y-%m-%d %H:%M:%S %z"),
        shlex.join(sys.argv),
        f"Python {platform.python_version()} on {platform.platform()}; {', '.join(versions)}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(shown("\n".join(lines)))
    return path


def terminal_width() -> int:
    """Return the terminal's columns; 100 without a terminal."""
    return shutil.get_terminal_size((100, 24)).columns
