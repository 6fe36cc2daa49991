"""The command `mllm-shapx`: a signal during the imports ends it like a later one."""

import os
import shlex
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; SIGHUP stays ignored under `nohup`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from mllm_shapx.cli import main as command_line

    command_line()


def _end(number: int, _frame: FrameType | None) -> None:
    """End the process: no work has begun, so the same command does everything."""
    command = shlex.join(["mllm-shapx", *sys.argv[1:]])
    os.write(2, f"\n{signal.Signals(number).name}: stopped; to go on: {command}\n".encode(errors="replace"))
    os._exit(128 + number)


if __name__ == "__main__":
    main()
