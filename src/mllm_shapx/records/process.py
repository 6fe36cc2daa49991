"""The identity of a process, across reboots, PID namespaces, reused ids and changed clocks."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

UNKNOWN_TICKS = -1
_START_TIME = 19
"""Place of `starttime` in /proc/PID/stat, counted from the state, which follows the command's name."""
_START_TOLERANCE_S = 5.0
"""Start times in seconds are computed from the clock and the time since boot, and move a little."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process of some machine."""

    boot_id: str
    """The kernel's id of the boot, empty where it has none."""
    pid_namespace: str
    """The namespace that the id belongs to, empty where there are none."""
    pid: int
    start_ticks: int
    """Clock ticks from boot to the start of the process, UNKNOWN_TICKS where that is not known."""

    def is_running(self, started_at: float) -> bool | None:
        """Return whether the process runs, None when it cannot be seen from here.

        Args:
            started_at: Its start in seconds since 1970, which decides where ticks are unknown.
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
    """Return when a process started in seconds since 1970, None when unknown; 0.0 for a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def _ticks_and_life(pid: str) -> tuple[int, bool] | None:
    """Return the start of a process in ticks and whether it is no zombie; None where /proc lacks it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
        state, *rest = text[text.rindex(b")") + 1 :].split()
        return int(rest[_START_TIME - 1]), state not in {b"Z", b"X"}
    except (OSError, ValueError, IndexError):
        return None


def _runs_since(pid: int, started_at: float) -> bool | None:
    """Return whether a process runs, by its start in seconds; None when the clock may have been set."""
    if not _exists(pid):
        return False
    start = process_start(pid)
    if start is not None and abs(start - started_at) < _START_TOLERANCE_S:
        return True
    return False if start == 0.0 else None


def _sees_own_namespace() -> bool:
    """Return whether /proc shows this process's namespace, which a container may leave to its host."""
    try:
        return str(Path("/proc/self").readlink()) == str(os.getpid())
    except OSError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # it runs, for another user
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
