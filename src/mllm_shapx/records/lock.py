"""One driver at a time on an output directory."""

import contextlib
import hashlib
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError

from mllm_shapx.errors import OutputError, ShapxError, StorageError
from mllm_shapx.records import process
from mllm_shapx.records.fields import Time
from mllm_shapx.records.layout import LOCK
from mllm_shapx.records.process import UNKNOWN_TICKS
from mllm_shapx.records.storage import Storage, encode_json

STALE_AFTER_S = 60.0
"""If the process is not visible, a heartbeat younger than this (seconds) counts as alive."""
WATCH_S = 35.0
"""An older heartbeat is watched for these seconds: clocks differ, but a changing heartbeat is alive."""

_HEARTBEAT_S = 15.0
_LOOK_S = 0.25
_ATTEMPTS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The holder of an output directory: the content of `.lock`."""

    token: str
    """Unique for every lock."""
    host: str
    boot_id: str
    """The kernel's boot id, empty if it has none."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    process_started_at: Time
    """Start of the process, seconds since 1970; changes when the clock is set."""
    started_at: Time
    """Time of taking the lock, seconds since 1970."""
    heartbeat: Time
    """Time of the last renewal, seconds since 1970."""
    pid_namespace: str = ""
    """Namespace of the process id; empty in locks of older versions and outside Linux."""
    start_ticks: int = UNKNOWN_TICKS
    """Start of the process, in clock ticks since boot; independent of the clock."""
    beats: int = 0
    """Number of renewals."""

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started_at))
        return f"process {self.pid} on {self.host}, started {started}"

    @classmethod
    def of_this_process(cls) -> Self:
        """Return the content of a new lock of this process."""
        now, pid = time.time(), os.getpid()
        return cls(
            token=secrets.token_hex(16),
            host=socket.gethostname(),
            boot_id=process.boot_id(),
            pid=pid,
            process_started_at=process.start_time(pid) or now,
            started_at=now,
            heartbeat=now,
            pid_namespace=process.pid_namespace(),
            start_ticks=process.start_ticks(),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """Return the lock file's content, None when it is damaged."""
        try:
            return TypeAdapter(cls).validate_json(data)
        except ValidationError:
            return None

    def is_running(self) -> bool | None:
        """Return whether the holder's process is running, None when it is not visible from here."""
        if self.host != socket.gethostname():
            return None
        return process.is_running(
            self.pid,
            boot=self.boot_id,
            namespace=self.pid_namespace,
            ticks=self.start_ticks,
            started_at=self.process_started_at,
        )

    def is_fresh(self, now: float) -> bool:
        """Return whether the heartbeat is recent, if both hosts' clocks agree."""
        return 0.0 <= now - self.heartbeat < STALE_AFTER_S

    def seems_alive(self, now: float) -> bool:
        """Return whether the holder may be running, without watching its heartbeat."""
        running = self.is_running()
        return self.is_fresh(now) if running is None else running


class OutputLock:
    """Keeps a second driver away from an experiment set's directory.

    `acquire` takes the lock or refuses. Then a thread renews the heartbeat, so that a busy driver counts as
    alive on other hosts. Works on network file systems. On object stores without conditional writes, two
    drivers that start at the same moment may both get the lock.
    """

    def __init__(
        self, storage: Storage, *, heartbeat_s: float = _HEARTBEAT_S, watch_s: float = WATCH_S
    ) -> None:
        self._storage = storage
        self._heartbeat_s = heartbeat_s
        self._watch_s = watch_s
        self._holder: LockHolder | None = None
        self._lost_to: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> tuple[str, ...]:
        """Take the lock; return notes for the user, for example on a takeover from a dead process.

        Raises:
            OutputError: When another driver uses the directory; the message names its host, pid and start.
            StorageError: When the lock cannot be written.
        """
        mine = LockHolder.of_this_process()
        for _ in range(_ATTEMPTS):
            notes = self._take(LOCK, mine)
            if notes is not None:
                self._holder = mine
                self._start_heartbeat()
                return notes
        raise OutputError(
            f"{self._storage.uri}: other drivers keep taking the lock; wait until they are done and run again"
        )

    def refresh(self) -> None:
        """Renew the heartbeat; a thread calls this while the lock is held."""
        holder = self._holder
        if holder is None:
            return
        current = self._read()
        if current is None and not self._storage.list():
            return  # the directory was removed, for example a shard's by `merge`
        if current is not None and current.token != holder.token:
            self._lost_to = str(current)
            return
        self._holder = replace(holder, heartbeat=time.time(), beats=holder.beats + 1)
        self._storage.write_bytes(LOCK, encode_json(asdict(self._holder)))

    def check(self) -> None:
        """Check that this process still holds the lock.

        Raises:
            OutputError: When another driver took it, because this one could not renew it.
        """
        if self._lost_to is not None:
            raise OutputError(
                f"{self._storage.uri} was taken over by {self._lost_to}; this driver stops writing to it"
            )

    def release(self) -> None:
        """Release the lock if this process still holds it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        holder, self._holder = self._holder, None
        if holder is None:
            return
        current = self._read()
        if current is not None and current.token == holder.token:
            self._storage.remove(LOCK)

    def _take(self, path: str, mine: LockHolder) -> tuple[str, ...] | None:
        """Replace a missing or dead holder's lock by `mine`; return notes, None if another was faster.

        Only one process may replace a dead holder's lock: the one that creates the claim, a lock file named
        by the dead holder's token, and then still finds that holder's lock.
        """
        content = encode_json(asdict(mine))
        if self._storage.create_exclusive(path, content):
            return ()
        seen = self._content(path)
        if seen is None:
            return None
        holder = LockHolder.from_bytes(seen)
        if holder is not None and self._is_alive(path, holder, seen):
            raise OutputError(self._refusal(holder))
        token = hashlib.sha256(seen).hexdigest()[:32] if holder is None else holder.token
        claim = f"{LOCK}.{token}"
        notes = self._take(claim, mine)
        if notes is None:
            return None
        is_mine = self._content(path) == seen
        if is_mine:
            self._storage.write_bytes(path, content)
        self._storage.remove(claim)
        if not is_mine:
            return None
        if holder is None:
            return (*notes, f"{self._storage.uri}: the lock file was damaged and was replaced")
        return (*notes, f"{self._storage.uri}: took over the lock of {holder}, which is no longer running")

    def _is_alive(self, path: str, holder: LockHolder, seen: bytes) -> bool:
        """Return whether the holder is running; if process and clock cannot tell, watch its heartbeat."""
        running = holder.is_running()
        if running is not None:
            return running
        if holder.is_fresh(time.time()):
            return True
        logger.warning(
            "%s is locked by %s, which cannot be seen from here; watching its heartbeat for %.0f s",
            self._storage.uri,
            holder,
            self._watch_s,
        )
        deadline = time.monotonic() + self._watch_s
        while time.monotonic() < deadline:
            time.sleep(min(_LOOK_S, self._watch_s))
            if (current := self._content(path)) != seen:
                return current is not None  # renewed, or released
        return False

    def _content(self, path: str) -> bytes | None:
        try:
            return self._storage.read_bytes(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OutputError(f"{self._storage.locate(path)} is no lock file: {error}; remove it") from error

    def _refusal(self, holder: LockHolder) -> str:
        place = self._storage.locate(LOCK)
        if holder.is_running():
            return (
                f"{self._storage.uri} is in use by {holder}; wait until it is done or stop it "
                f"(kill {holder.pid}), then run again with --resume"
            )
        age = time.time() - holder.heartbeat
        heard = (
            f"last seen {age:.0f} s ago" if holder.is_fresh(time.time()) else "which still renews its lock"
        )
        return (
            f"{self._storage.uri} is in use by {holder}, {heard}; wait until it is done. "
            f"If that process is dead, run again in {STALE_AFTER_S:.0f} s, or remove {place}"
        )

    def _read(self) -> LockHolder | None:
        content = self._content(LOCK)
        return None if content is None else LockHolder.from_bytes(content)

    def _start_heartbeat(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="output-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            # Other writes report a full disk; the next beat tries again.
            with contextlib.suppress(StorageError):
                self.refresh()


def lock_holder(storage: Storage) -> LockHolder | None:
    """Return the holder of a directory's lock, None without one; for `status`."""
    try:
        holder = LockHolder.from_bytes(storage.read_bytes(LOCK))
    except (FileNotFoundError, ValueError, ShapxError):
        return None
    return holder if holder is not None and holder.seems_alive(time.time()) else None
