"""Runs a worker's own server in a process beside it, and ends it with the worker, however that ends.

The worker starts this file as a program and holds its standard input open:

    python -I server_guardian.py COMMAND...

The end of the input means that the worker is gone or needs the server no more. Then all processes that the
command has started are ended. The work is done by a child of the program: Ray ends a worker by killing the
worker's own children first. It imports nothing of the package, so that it starts at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

GRACE_S = 10.0
"""Seconds that the server gets to end after SIGTERM."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run a command until it ends or standard input does; return its exit code."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # A terminal's Ctrl-C is for the worker, which finishes its rows.
        signal.signal(number, signal.SIG_IGN)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code if code >= 0 else 128 - code
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the server leaves behind becomes a child of this process
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)  # noqa: PLW1509, S603 -- the guardian has one thread here; the user's own command
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    threading.Thread(target=_watch_input, args=(server,), daemon=True).start()
    code = server.wait()
    _end(_descendants())
    return code if code >= 0 else 128 - code


def _watch_input(server: "subprocess.Popen[bytes]") -> None:
    while sys.stdin.buffer.read(1 << 10):
        pass
    found = _descendants()
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_S)
    _end({*found, *_descendants()})


def _descendants() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _end(processes: "set[psutil.Process] | list[psutil.Process]") -> None:
    """Kill what is left."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GRACE_S)


def _end_with_parent() -> None:
    """Run in the server's process before its program: reset signals, and end it if the guardian is killed."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    """Set a property of this process on Linux; other systems have none of them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # the watching thread may be blocked on the input
