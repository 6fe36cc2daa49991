"""Faults of the machine below a study: a disk that fills up or breaks, a clock that is wrong.

They are C files that a process loads before its libraries, so they need a C compiler.
"""

import shutil
import subprocess
from pathlib import Path
from typing import ClassVar, Literal

Failure = Literal["w", "f"]
"""A full disk, or one whose flushes fail."""


class BadDisk:
    """A disk that fails when told to, for processes that get its environment.

    Args:
        folder: Where the shim and its switch are kept.
        output: What lies on the disk.
    """

    ERRORS: ClassVar[dict[Failure, str]] = {"w": "No space left on device", "f": "Input/output error"}
    """What fails -> what the system says."""

    def __init__(self, folder: Path, output: Path) -> None:
        self._shim = _built("bad_disk", folder)
        self._switch = folder / "bad_disk.switch"
        self._output = output
        self.mend()

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


def wrong_clock(folder: Path, seconds: int) -> dict[str, str]:
    """Return the environment of a process whose wall clock is wrong by so many seconds."""
    shim = _built("wrong_clock", folder)
    return {"LD_PRELOAD": str(shim), "WRONG_CLOCK_SECONDS": str(seconds)}


def has_compiler() -> bool:
    """Return whether the faults can be built here."""
    return (shutil.which("gcc") or shutil.which("cc")) is not None


def _built(name: str, folder: Path) -> Path:
    """Return the shared library made from a C file beside this one."""
    library = folder / f"{name}.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    if not library.exists():
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library
