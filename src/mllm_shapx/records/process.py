"""Whether a process is running, across reboots, PID namespaces, reused ids and changed clocks.

psutil knows a process by the clock time of its start, which changes when the clock is set, and knows no
namespaces: Linux tells both in /proc.
"""

import os
from pathlib import Path

import psutil

UNKNOWN_TICKS = -1
_START_TIME = 19
"""Index of `starttime` in /proc/PID/stat, counted from the state, the field after the command's name."""
_START_TOLERANCE_S = 5.0
"""Tolerance of start times in seconds: they are computed from the clock and the time since boot."""


def boot_id() -> str:
    """Return the kernel's boot id, empty if it has none; a process id is valid only within one boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return the namespace of this process's id, empty if there are none."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def start_ticks() -> int:
    """Return the clock ticks from boot to this process's start; UNKNOWN_TICKS if unknown."""
    found = _ticks_and_life("self")
    return UNKNOWN_TICKS if found is None else found[0]


def start_time(pid: int) -> float | None:
    """Return the start of a process in seconds since 1970; None if unknown, 0.0 for a zombie."""
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def is_running(pid: int, *, boot: str, namespace: str, ticks: int, started_at: float) -> bool | None:
    """Return whether a process is running on this machine, None when it is not visible from here.

    Args:
        pid: Its id.
        boot: The `boot_id` of its machine.
        namespace: The `pid_namespace` of its id.
        ticks: Its `start_ticks`.
        started_at: Its `start_time`; used if ticks are unknown.
    """
    if boot != boot_id():
        return None
    if ticks == UNKNOWN_TICKS:
        return _runs_since(pid, started_at)
    if namespace != pid_namespace() or not _sees_own_namespace():
        return None
    found = _ticks_and_life(str(pid))
    if found is None:
        return None if _exists(pid) else False
    return found == (ticks, True)


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
    start = start_time(pid)
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
    # Not `psutil.pid_exists`: it misses other users' processes where /proc hides them.
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True
