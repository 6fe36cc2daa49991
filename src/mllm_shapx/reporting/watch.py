"""`status --watch`: the status of a study again and again, until nobody works on it."""

import json
import os
import time
from collections.abc import Callable
from typing import TextIO

from mllm_shapx.plaintext import printable_json, redacted, shown
from mllm_shapx.reporting.progress import is_interactive
from mllm_shapx.reporting.status import StudyStatus

WATCH_S = 2.0
"""Seconds between two looks."""
_WIDTH = 100


def watch(
    look: Callable[[], StudyStatus],
    stream: TextIO,
    *,
    as_json: bool = False,
    every_s: float = WATCH_S,
    sleep: Callable[[float], None] = time.sleep,
) -> StudyStatus:
    """Show a status until no driver works on the study; return the last one.

    In a terminal it is drawn in place. Elsewhere it is written again when it has changed, with `as_json` as
    one JSON object a line.

    Args:
        look: Reads the status.
        stream: Where to write.
        as_json: Whether data is written instead of a table.
        every_s: Seconds between two looks.
        sleep: Waits for so long.

    Raises:
        UsageError: When there is no study any more.
    """
    if not as_json and is_interactive(stream):
        return _watch_live(look, stream, every_s, sleep)
    before = None
    while True:
        found = look()
        content = found.to_json()
        if content != before:
            before = content
            stream.write(_line(found, as_json=as_json))
            stream.flush()
        if found.holder is None:
            return found
        sleep(every_s)


def _watch_live(
    look: Callable[[], StudyStatus], stream: TextIO, every_s: float, sleep: Callable[[float], None]
) -> StudyStatus:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream, force_terminal=True, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            found = look()
            text = shown(found.to_text(console.width, time.time(), most_runs=console.height - _FRAME_LINES))
            live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            if found.holder is None:
                return found
            sleep(every_s)


_FRAME_LINES = 10
"""Lines of a status that are no run's."""


def _line(found: StudyStatus, *, as_json: bool) -> str:
    if as_json:
        return printable_json(redacted(json.dumps(found.to_json(), ensure_ascii=False))) + "\n"
    try:
        width = os.get_terminal_size().columns
    except OSError:
        width = _WIDTH
    return shown(found.to_text(width)) + "\n"
