"""SIGINT, SIGTERM and SIGHUP end a command cleanly, from its start to its end.

While a study runs, the first signal requests a drain. At any other time it ends the command. A separate
thread sees every signal at once, and ends the process if the main thread does not react in time.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

ABORT_S = 10.0
"""Seconds that the main thread may take to end without a drain."""
LATE_S = 15.0
"""Seconds beyond the grace period that the last writes may take."""
SECOND_S = 3.0
"""Seconds that the main thread may take to end after the second signal."""
SAME_S = 1.0
"""Seconds in which a repeated signal counts as the first one: `timeout` and shells send it twice."""
LAST_S = 3.0
"""Seconds to release locks and processes, if the watching thread ends the process."""
JOB_STOP_S = 3.0
"""Seconds from SIGTERM to SIGKILL at `ray job stop`; default of RAY_JOB_STOP_WAIT_TIME_S."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the environment of a job's entrypoint."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopNow(SystemExit):
    """A signal ends the command. A `SystemExit`: recovery code and event loops do not catch it."""


class StopRequest:
    """The signal that asked the command to stop, if any.

    Attributes:
        again: The command that starts the work again; empty if there is none.
        resume: The command that continues the work once it has `begun`, as results may exist.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.again = self.resume = ""
        self.begun = False
        self.seen: int | None = None
        """The first signal that the watching thread saw."""
        self.announced = False
        """Whether the user saw a message on the first signal. The next one then counts as the second."""
        self._at = 0.0
        self._grace_s: float | None = None
        self._last: list[Callable[[], object]] = []

    @property
    def go_on(self) -> str:
        """Return the command that continues the work."""
        return self.resume if self.begun else self.again

    @property
    def exit_code(self) -> int:
        """Return 129 for SIGHUP, 130 for SIGINT and 143 for SIGTERM, as shells do."""
        return 128 + (self.signal or 0)

    @property
    def name(self) -> str:
        """Return the signal's name."""
        return "" if self.signal is None else signal.Signals(self.signal).name

    @property
    def grace_s(self) -> float | None:
        """Return the seconds that running rows get, in a Ray job at most Ray's; None while no study runs."""
        wanted = self._grace_s
        if wanted is None or JOB_VARIABLE not in os.environ or self.signal != signal.SIGTERM:
            return wanted
        try:
            left = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_S))
        except ValueError:
            left = JOB_STOP_S
        return min(wanted, left)

    def announcement(self) -> str:
        """Return the message for the first signal of a drain."""
        self.announced = True
        return self._with_command(
            f"{self.name}: finishing the rows under way, for {self.grace_s:g} s at most; "
            "a second signal stops at once"
        )

    @contextlib.contextmanager
    def draining(self, grace_s: float) -> Iterator[None]:
        """Only record the first signal: the caller checks `signal` and ends the work in time."""
        self._grace_s = grace_s
        try:
            yield
        finally:
            self._grace_s = None

    @contextlib.contextmanager
    def at_the_last(self, action: Callable[[], object]) -> Iterator[None]:
        """Call `action` if the watching thread ends the process; otherwise the caller does it."""
        self._last.append(action)
        try:
            yield
        finally:
            self._last.remove(action)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Record the first signal, or end the command if no study runs; end it at the second signal."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = number, now
            if self._grace_s is None:
                self.announced = True
                self._write(f"{self.name}: stopped")
                raise StopNow(128 + number)
        elif self.is_second(number, self._at, now):
            self._write("stopped at once; what was written is valid")
            raise StopNow(128 + number)

    def is_second(self, number: int, first_at: float, now: float) -> bool:
        """Return whether a further signal counts as a second one."""
        return number != signal.SIGHUP and (self.announced or now - first_at > SAME_S)

    def force(self, code: int) -> None:
        """End the process, even if its threads do not return."""
        self._write("the work under way did not end in time; what was written is valid")
        last = threading.Thread(target=self._clean_up, daemon=True)
        last.start()
        last.join(LAST_S)
        os._exit(code)

    def _clean_up(self) -> None:
        for action in reversed(self._last):
            with contextlib.suppress(Exception):  # the other actions must still run
                action()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    def _write(self, text: str) -> None:
        """Write a line. Not with print: the interrupted code may hold its lock."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{self._with_command(text)}\n".encode(errors="replace"))

    def _with_command(self, text: str) -> str:
        return f"{text}; to go on: {self.go_on}" if self.go_on else text


@contextlib.contextmanager
def stop_requests(request: StopRequest) -> Iterator[StopRequest]:
    """Handle the signals with `request`. Does nothing outside the main thread, the only one that may."""
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    watched = [number for number in SIGNALS if number != signal.SIGHUP or not under_nohup]
    # A closed terminal sends SIGHUP to all its processes. Child processes inherit the mask, so they live
    # until the drain is done. Only the watching thread receives the signal.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP} & set(watched))
    watcher = threading.Thread(target=_watch, args=(request, receiver), name="signals", daemon=True)
    watcher.start()
    fd = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    before = {number: signal.getsignal(number) for number in watched}
    try:
        for number in watched:
            signal.signal(number, request.handle)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)
        os.write(sender, b"\0")
        watcher.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.close(sender)
        os.close(receiver)


def _watch(request: StopRequest, receiver: int) -> None:
    """Watch for signals; end the process when the main thread is late."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    first_at, code = 0.0, 0
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([receiver], [], [], left)[0]:
            request.force(code)
        for number in os.read(receiver, 64):
            if number == 0:
                return
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if deadline is None:
                request.seen = number
                first_at, code, grace = now, 128 + number, request.grace_s
                deadline = now + (ABORT_S if grace is None else grace + LATE_S)
            elif request.is_second(number, first_at, now):
                deadline = min(deadline, now + SECOND_S)
