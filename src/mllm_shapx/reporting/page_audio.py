"""The recordings of a page: each once, with the outline of its waveform, up to a limit of bytes."""

import base64
import hashlib
from typing import Any

import numpy as np

from mllm_shapx.data.audio import decode
from mllm_shapx.errors import ShapxError
from mllm_shapx.reporting.reading import RunFiles

MOST_SOUND = 15_000_000
"""Bytes of recordings in one page."""

_COLUMNS = 240
"""Points of a waveform's outline."""
_LEVELS = 99


class Recordings:
    """Collects recordings; each content is kept once."""

    def __init__(self, most_bytes: int = MOST_SOUND) -> None:
        self.entries: list[dict[str, Any]] = []
        """`d` seconds, `k` outline (0 to 99 for each column), `u` base64 of the WAV file."""
        self._most = most_bytes
        self._left = most_bytes
        self._places: dict[bytes, int] = {}
        """Digest of a recording's content -> its position."""
        self._seen: dict[tuple[str, str], int | None] = {}
        self._without = 0
        self._unreadable = 0

    def place(self, run: RunFiles, path: str) -> int | None:
        """Return a recording's position in `entries`, None where it is not in the page.

        Args:
            run: The run that it belongs to.
            path: Its path below the run's directory.
        """
        seen = (run.records.storage.locate(run.name), path)
        if seen not in self._seen:
            self._seen[seen] = self._place(run, path)
        return self._seen[seen]

    def notes(self) -> list[str]:
        """Return notes on the recordings that are not in the page."""
        notes = []
        if self._without:
            notes.append(
                f"The page takes {self._most / 1e6:g} MB of recordings: {self._without:,} more are left out, "
                "and their segments are shown without sound (`report --audio-limit MB`)."
            )
        if self._unreadable:
            notes.append(f"{self._unreadable:,} recording(s) cannot be read and are left out.")
        return notes

    def _place(self, run: RunFiles, path: str) -> int | None:
        storage, place = run.records.storage, f"{run.name}/{path}"
        if self._left <= 0:
            self._without += 1
            return None
        try:
            data = storage.read_bytes(place)
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in self._places:
                return self._places[digest]
            if len(data) > self._left:
                # The page has the recordings of the first rows.
                self._left, self._without = 0, self._without + 1
                return None
            entry = _entry(data)
        except (OSError, ValueError, ShapxError):
            self._unreadable += 1
            return None
        self._left -= len(data)
        self._places[digest] = len(self.entries)
        self.entries.append(entry)
        return len(self.entries) - 1


def _entry(data: bytes) -> dict[str, Any]:
    waveform, rate = decode(data)
    columns = np.array_split(np.abs(waveform), min(_COLUMNS, len(waveform)))
    peaks = np.array([column.max() for column in columns])
    loudest = float(peaks.max()) or 1.0
    levels = np.rint(peaks / loudest * _LEVELS).astype(int)
    return {
        "d": round(len(waveform) / rate, 4),
        "k": levels.tolist(),
        "u": base64.b64encode(data).decode("ascii"),
    }
