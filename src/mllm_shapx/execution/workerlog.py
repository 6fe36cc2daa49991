"""The last log lines of a worker's process, where its log is on this machine."""

import os
from pathlib import Path

LINES = 20
_MOST_BYTES = 16_384


def log_tail(pid: int) -> tuple[str, ...]:
    """Return the last lines of the standard error of process `pid`, if its log is on this machine."""
    session = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "session_latest" / "logs"  # noqa: S108
    lines: list[str] = []
    for path in sorted(session.glob(f"worker-*-{pid}.err")):
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _MOST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-LINES:]
    return tuple(lines)
