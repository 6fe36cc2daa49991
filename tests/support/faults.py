"""Faults of a study's machine: a full or broken disk, a wrong clock.

They are C files that a process loads before its libraries, and need a C compiler.
"""

import shutil
import subprocess
from pathlib import Path
from typing import ClassVar, Literal

Failure = Literal["w", "f"]
"""`w`: a full disk. `f`: failing flushes."""


class BadDisk:
    """A disk that fails on demand, for processes with its environment.

    Args:
        folder: Folder of the shim and its switch.
        output: Folder on the disk.
    """

    ERRORS: ClassVar[dict[Failure, str]] = {"w": "No space left on device", "f": "Input/output error"}
    """Failure -> the system's message."""

    def __init__(self, folder: Path, output: Path) -> None:
        self._shim = _built("bad_disk", folder)
        self._switch = folder / "bad_disk.switch"
        self._output = output
        self.mend()

    @property
    def env(self) -> dict[str, str]:
        """Environment of the processes that use the disk."""
        return {
            "LD_PRELOAD": str(self._shim),
            "BAD_DISK_FOLDER": str(self._output),
            "BAD_DISK_SWITCH": str(self._switch),
        }

    def fail(self, what: Failure) -> None:
        """Let every later write (`w`) or flush (`f`) fail."""
        self._set(what)

    def mend(self) -> None:
        """Let nothing fail."""
        self._set("-")

    def _set(self, what: str) -> None:
        # In place: it is mapped by the processes.
        with self._switch.open("r+b" if self._switch.exists() else "wb") as file:
            file.write(what.encode())


def wrong_clock(folder: Path, seconds: int) -> dict[str, str]:
    """Return the environment of a process whose wall clock is wrong by `seconds`."""
    shim = _built("wrong_clock", folder)
    return {"LD_PRELOAD": str(shim), "WRONG_CLOCK_SECONDS": str(seconds)}


def has_compiler() -> bool:
    """Return whether the faults can be built here."""
    return (shutil.which("gcc") or shutil.which("cc")) is not None


def _built(name: str, folder: Path) -> Path:
    """Return the shared library of a C file next to this one."""
    library = folder / f"{name}.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    if not library.exists():
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library
