"""The identity of a process, across reboots, PID namespaces, reused ids and changed clocks."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

UNKNOWN_TICKS = -1
_START_TIME = 19
"""Index of `starttime` in /proc/PID/stat, counted from the state, the field after the command's name."""
_START_TOLERANCE_S = 5.0
"""Tolerance of start times in seconds: they are computed from the clock and the time since boot."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process on a machine."""

    boot_id: str
    """The kernel's boot id, empty if it has none."""
    pid_namespace: str
    """The namespace of the process id, empty if there are none."""
    pid: int
    start_ticks: int
    """Clock ticks from boot to the start of the process; UNKNOWN_TICKS if unknown."""

    def is_running(self, started_at: float) -> bool | None:
        """Return whether the process is running, None when it is not visible from here.

        Args:
            started_at: Its start in seconds since 1970; used if ticks are unknown.
        """
        me = this_process()
        if self.boot_id != me.boot_id:
            return None
        if self.start_ticks == UNKNOWN_TICKS:
            return _runs_since(self.pid, started_at)
        if self.pid_namespace != me.pid_namespace or not _sees_own_namespace():
            return None
        found = _ticks_and_life(str(self.pid))
        if found is None:
            return None if _exists(self.pid) else False
        return found == (self.start_ticks, True)


def this_process() -> ProcessIdentity:
    """Return the identity of the calling process."""
    found = _ticks_and_life("self")
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return ProcessIdentity(_boot_id(), namespace, os.getpid(), UNKNOWN_TICKS if found is None else found[0])


def process_start(pid: int) -> float | None:
    """Return the start of a process in seconds since 1970; None if unknown, 0.0 for a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def _ticks_and_life(pid: str) -> tuple[int, bool] | None:
    """Return (start in ticks, whether alive and not a zombie) of a process; None if /proc lacks it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
        state, *rest = text[text.rindex(b")") + 1 :].split()
        return int(rest[_START_TIME - 1]), state not in {b"Z", b"X"}
    except (OSError, ValueError, IndexError):
        return None


def _runs_since(pid: int, started_at: float) -> bool | None:
    """Return whether a process is running, by its start in seconds; None if the clock may have been set."""
    if not _exists(pid):
        return False
    start = process_start(pid)
    if start is not None and abs(start - started_at) < _START_TOLERANCE_S:
        return True
    return False if start == 0.0 else None


def _sees_own_namespace() -> bool:
    """Return whether /proc shows this process's namespace; in a container it may show the host's."""
    try:
        return str(Path("/proc/self").readlink()) == str(os.getpid())
    except OSError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # it is running as another user
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
