"""A private folder of the run: for sockets, logs, the token and the pickled study."""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mllm_shapx.errors import ResourceError

PREFIX = "shapx-run-"
_LONGEST_SOCKET = 107 if sys.platform == "linux" else 103
_RAY_NEEDS = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_LONGEST_BASE = _LONGEST_SOCKET - _RAY_NEEDS - len(f"/{PREFIX}12345678")
"""Maximum length of the parent folder's path: socket paths are limited."""

_USUAL = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 -- folders are made in them by mkdtemp


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder that is open only to this user, and remove it at the end.

    Folders of killed runs are removed first. A living run holds its folder's lock; the kernel releases it
    when the process ends.

    Raises:
        ResourceError: When no parent folder is suitable.
    """
    base = _base()
    for old in base.glob(f"{PREFIX}*"):
        _remove_abandoned(old)
    folder, lock = _make(base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove the folder of an ended run, if it is this user's."""
    try:
        found = folder.lstat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o77 or not folder.is_dir() or folder.is_symlink():
            return
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _end_orphans(folder)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its run is alive, or the file system has no locks
    finally:
        os.close(lock)


def _end_orphans(folder: Path) -> None:
    """End Ray's processes that write to the folder of an ended run.

    Agents continue for minutes after the death of raylet and GCS, and their titles have no folder.
    """
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith("ray::") and any(
                Path(file.path).is_relative_to(folder) for file in process.open_files()
            ):
                process.kill()


def _make(base: Path) -> tuple[Path, int]:
    """Return a new folder and its lock. Another run may remove the folder before it is locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _base() -> Path:
    """Return the first existing, writable folder with a short path."""
    asked = os.environ.get("RAY_TMPDIR")
    for name in filter(None, (asked, os.environ.get("TMPDIR"), *_USUAL)):
        base = Path(name).absolute()
        fits = len(os.fsencode(base)) <= _LONGEST_BASE
        if fits and base.is_dir() and os.access(base, os.W_OK | os.X_OK):
            return base
    raise ResourceError(
        f"there is no place for Ray's temporary files: none of RAY_TMPDIR, TMPDIR, {', '.join(_USUAL)} is "
        f"a folder that can be written and whose path has at most {_LONGEST_BASE} characters; name one in "
        "RAY_TMPDIR"
    )
