"""Holds that a model's directories are what they were: between digest and load, and while they are read."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_shapx.errors import ModelChangedError, ModelError
from mllm_shapx.models.identity import files_below

_SETTLED_S = 2.0
"""Age of the youngest file from which on the times of a file system tell every later change apart."""


@dataclass(frozen=True, slots=True)
class Version:
    """What was found when a model was looked at, to be held against what is loaded."""

    key: str
    """Where the config names it."""
    directories: tuple[Path, ...]
    """The local directories that it is loaded from; none for what comes from the hub at a commit."""
    commit: str
    """Digest of the directories, or hub commit."""
    stamp: str = ""
    """See `stamp_of`."""

    @classmethod
    def of(cls, key: str, directories: Sequence[Path], digest: Callable[[], str]) -> "Version":
        """Return the version that `digest` finds.

        Raises:
            ModelError: When files changed while they were read.
        """
        before = _facts(directories)
        commit = digest()
        if _facts(directories) != before:
            raise ModelError(
                f"{key}: files in {_named(directories)} changed while they were read; wait until whatever "
                "writes them has ended, or give the study a copy"
            )
        return cls(key, tuple(directories), commit, stamp_of(directories))

    def loaded[T](self, load: Callable[[], T], digest: Callable[[], str]) -> T:
        """Return what `load` loads, once it is known to be this version.

        Files whose stamp is the one of this version are not read a second time.

        Raises:
            ModelChangedError: When the files are others now, or were written to while they were loaded.
        """
        before = _facts(self.directories)
        result = load()
        is_known = bool(self.stamp) and stamp_of(self.directories) == self.stamp
        if self.directories and (_facts(self.directories) != before or not (is_known or self._holds(digest))):
            raise ModelChangedError(
                f"{self.key}: the files in {_named(self.directories)} are not the ones that the study began "
                "with: something has written to them since. No answer of the new files was kept. Put the old "
                "files back and go on with --resume, or explain the new ones under another "
                "experiment_set_id. Give a study a copy of a directory that a training job writes to"
            )
        return result

    def _holds(self, digest: Callable[[], str]) -> bool:
        return digest() == self.commit


def stamp_of(directories: Sequence[Path]) -> str:
    """Return a hash of the names, sizes, times and inodes of the directories' files; no file is opened.

    Equal stamps mean equal contents: what writes to a file changes the time of its inode, which no program
    can set. The stamp is empty, and proves nothing, while a file is younger than two seconds.
    """
    facts = _facts(directories)
    youngest = max((max(fact[2], fact[3]) for fact in facts), default=0) / 1e9
    if not facts or time.time() - youngest < _SETTLED_S:
        return ""
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()


def _facts(directories: Sequence[Path]) -> list[tuple[str, int, int, int, int, int]]:
    """Return name, size, times, inode and device of every file."""
    found = []
    for path in sorted(path for directory in directories for _, path in files_below(directory)):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # being replaced; the next look finds another one
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append((str(path), status.st_size, *times, status.st_ino, status.st_dev))
    return found


def _named(directories: Sequence[Path]) -> str:
    return " and ".join(map(str, directories))
