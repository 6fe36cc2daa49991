"""`status --watch`: reads the status of a study again and again until no driver is running."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from mllm_shapx.plaintext import printable_json, redacted, shown
from mllm_shapx.reporting.progress import is_interactive
from mllm_shapx.reporting.status import StudyStatus

_WATCH_S = 2.0
_FRAME_LINES = 10
"""Lines of a status other than those of runs."""

type _Show = Callable[[StudyStatus], None]


def watch(
    look: Callable[[], StudyStatus],
    stream: TextIO,
    *,
    as_json: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> StudyStatus:
    """Show a status every two seconds until no driver works on the study; return the last one.

    In a terminal it is drawn in place. Elsewhere it is written again when it has changed, with `as_json` as
    one JSON object a line.

    Args:
        look: Reads the status.
        stream: Where to write.
        as_json: Whether data is written instead of a table.
        sleep: Waits for so long.

    Raises:
        UsageError: When the study's directory is gone.
    """
    is_live = not as_json and is_interactive(stream)
    with _drawn(stream) if is_live else _written(stream, as_json=as_json) as show:
        while True:
            found = look()
            show(found)
            if found.holder is None:
                return found
            sleep(_WATCH_S)


@contextlib.contextmanager
def _drawn(stream: TextIO) -> Iterator[_Show]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream, force_terminal=True, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def show(found: StudyStatus) -> None:
            text = found.to_text(console.width, most_runs=console.height - _FRAME_LINES)
            live.update(Text(shown(text), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show


@contextlib.contextmanager
def _written(stream: TextIO, *, as_json: bool) -> Iterator[_Show]:
    before = None

    def show(found: StudyStatus) -> None:
        nonlocal before
        content = found.to_json()
        if content == before:
            return
        before = content
        if as_json:
            text = printable_json(redacted(json.dumps(content, ensure_ascii=False)))
        else:
            text = shown(found.to_text(shutil.get_terminal_size((100, 24)).columns))
        stream.write(text + "\n")
        stream.flush()

    yield show
