"""A cache of the most recently used values, bounded by their bytes."""

import threading
from collections import OrderedDict
from typing import Protocol


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class ByteCache[T: _Sized]:
    """The most recently used values that take at most `most` bytes together. For several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[bytes, T] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> T | None:
        """Return a value, None without one."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: bytes, value: T) -> None:
        """Keep a value; drop the least recently used ones."""
        with self._lock:
            if key not in self._held:
                self._held[key] = value
                self._bytes += value.nbytes
            while self._bytes > self._most:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.nbytes

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._held.clear()
            self._bytes = 0
