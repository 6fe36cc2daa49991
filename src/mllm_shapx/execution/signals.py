"""SIGINT and SIGTERM: the first asks for a drain, the second ends at once."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class StopNow(SystemExit):
    """A second signal came. A `SystemExit`, which neither recovery nor an event loop holds up."""


class StopRequest:
    """Whether somebody asked the driver to stop, and how."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def exit_code(self) -> int:
        """Return 130 for SIGINT and 143 for SIGTERM, as shells do."""
        return 128 + (self.signal or 0)

    @property
    def name(self) -> str:
        """Return the signal's name."""
        return "" if self.signal is None else signal.Signals(self.signal).name

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the first signal, end at the second."""
        if self.signal is not None:
            # Not print: the handler may have interrupted one.
            os.write(2, b"\nstopped at once; what was written is valid, go on with --resume\n")
            raise StopNow(128 + number)
        self.signal = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Watch for SIGINT and SIGTERM. Enter it after `ray.init`, which replaces the handlers."""
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
