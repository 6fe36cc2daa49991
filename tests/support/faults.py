"""Faults of the machine below a study: a disk that fills up or breaks, a clock that is set back."""

import shutil
import subprocess
from pathlib import Path
from typing import ClassVar, Literal

Failure = Literal["w", "f"]
"""A full disk, or one whose flushes fail."""

_SOURCE = Path(__file__).with_name("bad_disk.c")


class BadDisk:
    """A disk that fails when told to, for processes that get its environment. Needs a C compiler.

    Args:
        folder: Where the shim and its switch are kept.
        output: What lies on the disk.
    """

    ERRORS: ClassVar[dict[Failure, str]] = {"w": "No space left on device", "f": "Input/output error"}
    """What fails -> what the system says."""

    def __init__(self, folder: Path, output: Path) -> None:
        self._shim = folder / "bad_disk.so"
        self._switch = folder / "bad_disk.switch"
        self._output = output
        self.mend()
        compiler = shutil.which("gcc") or shutil.which("cc")
        assert compiler is not None
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(self._shim), str(_SOURCE)], check=True)

    @staticmethod
    def is_available() -> bool:
        """Return whether it can be built here."""
        return (shutil.which("gcc") or shutil.which("cc")) is not None

    @property
    def env(self) -> dict[str, str]:
        """Environment of the processes whose disk it is."""
        return {
            "LD_PRELOAD": str(self._shim),
            "BAD_DISK_FOLDER": str(self._output),
            "BAD_DISK_SWITCH": str(self._switch),
        }

    def fail(self, what: Failure) -> None:
        """Let every write (`w`) or every flush (`f`) fail from now on."""
        self._set(what)

    def mend(self) -> None:
        """Let nothing fail."""
        self._set("-")

    def _set(self, what: str) -> None:
        # In place: the processes have it mapped.
        with self._switch.open("r+b" if self._switch.exists() else "wb") as file:
            file.write(what.encode())


def shifted_clock(hours: int) -> dict[str, str] | None:
    """Return the environment of a process whose clock is wrong by so many hours; None without `faketime`."""
    program = shutil.which("faketime")
    if program is None:
        return None
    shown = subprocess.run([program, "-f", "+0h", "env"], capture_output=True, text=True, check=True).stdout
    (preload,) = [line for line in shown.splitlines() if line.startswith("LD_PRELOAD=")]
    return {
        "LD_PRELOAD": preload.removeprefix("LD_PRELOAD="),
        "FAKETIME": f"{hours:+d}h",
        # A step of the wall clock leaves the monotonic one alone.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
