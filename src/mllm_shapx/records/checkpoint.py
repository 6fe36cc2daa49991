"""`checkpoint.json`: a run's progress. The cost per completed row does not grow with the run."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from mllm_shapx.records.fields import Time, Whole, validated
from mllm_shapx.records.storage import Storage, decode_json

VERSION = 2

# The file lists every finished row, so writing it is O(rows): 100,000 rows take about 30 ms.
_SHORTEST_INTERVAL_S = 2.0
_ROWS_PER_EXTRA_SECOND = 10_000


@dataclass(frozen=True)
class Checkpoint:
    """The file's content (docs/formats.md, The output)."""

    completed_indices: tuple[Whole, ...]
    """Row indices, ascending."""
    failed_indices: tuple[Whole, ...]
    """Quarantined row indices, ascending."""
    next_index: Whole
    """Position, in selection order, of the first row that is not completed."""
    created_at: Time
    """Seconds since 1970."""
    updated_at: Time

    def to_bytes(self) -> bytes:
        """Return the file's bytes: indented JSON, with long lists on one line each."""
        content = {"version": VERSION, **vars(self)}
        lines = ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in content.items())
        return f"{{\n{lines}\n}}\n".encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Checkpoint":
        """Read the file.

        Raises:
            ValueError: When it is not JSON or not a checkpoint; the message has the reason.
        """
        content = decode_json(data)
        if isinstance(content, dict):
            if content.get("version") != VERSION and not _is_of_older_runner(content):
                raise ValueError(f"its version is {content.get('version')!r}, not {VERSION}")
            # The older runner never quarantines rows.
            content = {"failed_indices": [], **content}
        return validated(_adapter(), content)


class CheckpointWriter:
    """Keeps one run's checkpoint; writes it every few seconds, not for each sample.

    The samples on disk decide which rows are done; `RunReader.inspect` finds samples that the file lacks
    after a crash. Write it once before the first sample: a run with samples and no checkpoint counts as
    abandoned.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        rows_in_order: Sequence[int],
        *,
        completed: Iterable[int] = (),
        failed: Iterable[int] = (),
        created_at: float | None = None,
    ) -> None:
        self._storage = storage
        self._path = path
        self._rows = rows_in_order
        self._completed = set(completed)
        self._failed = set(failed) - self._completed
        self._created_at = time.time() if created_at is None else created_at
        self._next = 0
        self._written_at = -float("inf")
        self._dirty = True

    @property
    def next_index(self) -> int:
        """Return the position of the first row in selection order that is not completed."""
        while self._next < len(self._rows) and self._rows[self._next] in self._completed:
            self._next += 1
        return self._next

    def complete(self, row_index: int) -> None:
        """Add a row whose sample is on disk."""
        self._completed.add(row_index)
        self._failed.discard(row_index)
        self._dirty = True

    def fail(self, row_index: int) -> None:
        """Add a quarantined row."""
        if row_index not in self._completed:
            self._failed.add(row_index)
            self._dirty = True

    @property
    def interval_s(self) -> float:
        """Return the seconds between two writes; they grow with the file, so that writing stays cheap."""
        return _SHORTEST_INTERVAL_S + (len(self._completed) + len(self._failed)) / _ROWS_PER_EXTRA_SECOND

    def maybe_write(self, now: float | None = None) -> bool:
        """Write if something changed and the interval has passed; return whether it was written.

        `now` is in seconds of `time.monotonic`.
        """
        now = time.monotonic() if now is None else now
        if not self._dirty or now - self._written_at < self.interval_s:
            return False
        self.write(now)
        return True

    def write(self, now: float | None = None) -> None:
        """Write the file."""
        self._storage.write_bytes(self._path, self.snapshot().to_bytes())
        self._written_at = time.monotonic() if now is None else now
        self._dirty = False

    def snapshot(self) -> Checkpoint:
        """Return the file's current content."""
        return Checkpoint(
            completed_indices=tuple(sorted(self._completed)),
            failed_indices=tuple(sorted(self._failed)),
            next_index=self.next_index,
            created_at=self._created_at,
            updated_at=time.time(),
        )


def _is_of_older_runner(content: dict[str, Any]) -> bool:
    return "failed_indices" not in content and content.get("version") in (None, 1)


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Checkpoint]:
    return TypeAdapter(Checkpoint)
