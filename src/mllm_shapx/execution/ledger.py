"""The queue: the state of each unit, and the charging of failures to units."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from mllm_shapx.planning.units import WorkUnit

SAME_FAILURES = 10
"""Rows that may fail with the same unexpected error before the first sample."""


class UnitState(Enum):
    """The state of a unit."""

    QUEUED = "queued"
    LEASED = "leased"
    ENDED = "ended"
    """Done or quarantined."""


@dataclass(slots=True)
class _Entry:
    unit: WorkUnit
    rank: int
    open_runs: tuple[str, ...]
    """Runs that are neither done nor quarantined."""
    state: UnitState = UnitState.QUEUED
    holder: str | None = None
    """Worker that has it, while it is leased."""
    attempts: int = 0
    alone: bool = False
    """Whether the unit needs a worker to itself, because it shared one that died."""


@dataclass(frozen=True, slots=True)
class Blame:
    """The effect of a lost worker or an error on one unit."""

    unit: WorkUnit
    attempts: int
    """Attempts charged to the unit so far."""
    charged: bool
    """Whether this loss was charged to it."""
    quarantined: bool

    def note(self, worker: str, detail: str, max_attempts: int) -> str:
        """Return a sentence on the effect of the loss of `worker`."""
        row = self.unit.row_index
        if not self.charged:
            return f"row {row} goes back to the queue: worker {worker} is gone ({detail})"
        verdict = "given up" if self.quarantined else "tried again"
        return (
            f"row {row} was alone in worker {worker} when it died (attempt {self.attempts} of "
            f"{max_attempts}, {verdict}): {detail}"
        )


@dataclass(slots=True)
class _Holder:
    units: set[str] = field(default_factory=set)
    draining: bool = False
    """Whether the worker takes nothing new, so that a suspect can run alone in it."""


class Ledger:
    """Every unit of a study and its state.

    Units are handed out in the given order. Every call may be repeated: messages can arrive twice, or after a
    change of the unit's state.
    """

    def __init__(
        self, units: Sequence[WorkUnit], *, max_attempts: int = 3, attempts: Mapping[str, int] | None = None
    ) -> None:
        """Queue `units`, with the attempts of earlier calls."""
        if max_attempts < 1:
            raise ValueError("max_attempts must be at least 1")
        self._max_attempts = max_attempts
        self._entries = {
            unit.unit_id: _Entry(unit, rank, open_runs=unit.run_names) for rank, unit in enumerate(units)
        }
        if len(self._entries) != len(units):
            raise ValueError("two units have the same id")
        for unit_id, count in (attempts or {}).items():
            if unit_id in self._entries:
                self._entries[unit_id].attempts = count
        self._queue = [(entry.rank, unit_id) for unit_id, entry in self._entries.items()]
        heapq.heapify(self._queue)
        self._suspects: list[tuple[int, str]] = []
        self._holders: defaultdict[str, _Holder] = defaultdict(_Holder)
        self._counts = dict.fromkeys(UnitState, 0)
        self._counts[UnitState.QUEUED] = len(units)

    def lease(self, worker: str) -> WorkUnit | None:
        """Give `worker` a unit, or None if it should take nothing now.

        None does not mean that the study is over: units of other workers may come back, and a suspect waits
        for a free worker.
        """
        holder = self._holders[worker]
        if any(self._entries[unit_id].alone for unit_id in holder.units):
            return None
        suspect = self._first(self._suspects, alone=True)
        if suspect is not None and not holder.units:
            heapq.heappop(self._suspects)
            holder.draining = False
            return self._hand_out(suspect, worker)
        others = (other for name, other in self._holders.items() if name != worker)
        holder.draining = suspect is not None and (
            holder.draining or not any(other.draining for other in others)
        )
        if holder.draining:
            return None
        unit_id = self._first(self._queue, alone=False)
        if unit_id is None:
            return None
        heapq.heappop(self._queue)
        return self._hand_out(unit_id, worker)

    def reorder(self, cost: Callable[[WorkUnit], float]) -> None:
        """Sort the queue by decreasing `cost`."""
        queued = [entry for entry in self._entries.values() if entry.state is UnitState.QUEUED]
        ranks = sorted(entry.rank for entry in queued)
        queued.sort(key=lambda entry: (-cost(entry.unit), entry.rank))
        for rank, entry in zip(ranks, queued, strict=True):
            entry.rank = rank
        for queue in (self._queue, self._suspects):
            queue[:] = [(self._entries[unit_id].rank, unit_id) for _, unit_id in queue]
            heapq.heapify(queue)

    def open_runs(self, unit_id: str) -> tuple[str, ...]:
        """Return the runs of a unit that are neither done nor quarantined."""
        entry = self._entries.get(unit_id)
        return () if entry is None else entry.open_runs

    def settle(self, unit_id: str, run_names: Collection[str]) -> bool:
        """Mark runs of a unit as done or quarantined; return whether they were the last ones."""
        entry = self._entries.get(unit_id)
        if entry is None or not entry.open_runs:
            return False
        entry.open_runs = tuple(name for name in entry.open_runs if name not in run_names)
        if entry.open_runs:
            return False
        self._move(entry, UnitState.ENDED)
        return True

    def error(self, worker: str, unit_id: str) -> Blame:
        """Charge a unit for its error in a living worker; queue it again or quarantine it."""
        entry = self._entries[unit_id]
        return self._charge(entry) if entry.holder == worker else _no_blame(entry)

    def worker_lost(self, worker: str, *, innocent: bool = False) -> list[Blame]:
        """Take back the units of a lost worker.

        A unit that was alone in the worker is charged an attempt. Units that shared the worker are suspects:
        each runs alone next. With `innocent` (a preempted or lost node) no unit is charged or suspected.
        """
        units = self._holders[worker].units
        held = sorted((self._entries[unit_id] for unit_id in units), key=lambda entry: entry.rank)
        blames = []
        for entry in held:
            if not innocent and len(held) == 1:
                blames.append(self._charge(entry))
            else:
                entry.alone = entry.alone or not innocent
                self._requeue(entry)
                blames.append(_no_blame(entry))
        del self._holders[worker]
        return blames

    def reconcile(self, worker: str, held: Collection[str]) -> list[str]:
        """Match the leases of `worker` to the units that it reports; return the units that it should drop.

        Leased units that it does not hold go back to the queue: their hand-out never reached it. Queued units
        that it holds are leased to it again: the coordinator restarted.
        """
        for unit_id in sorted(self._holders[worker].units - set(held)):
            self._requeue(self._entries[unit_id])
        drop = []
        for unit_id in held:
            entry = self._entries.get(unit_id)
            if entry is None or entry.state is UnitState.ENDED:
                drop.append(unit_id)
            elif entry.state is UnitState.QUEUED:
                self._hand_out(unit_id, worker)
            elif entry.holder != worker:
                drop.append(unit_id)
        return drop

    def claim(self, worker: str, unit_id: str) -> None:
        """Lease a queued unit to the worker that has held it since before a restart."""
        entry = self._entries.get(unit_id)
        if entry is not None and entry.state is UnitState.QUEUED:
            self._hand_out(unit_id, worker)

    def holds(self, worker: str, unit_id: str) -> bool:
        """Whether the unit is leased to `worker`."""
        entry = self._entries.get(unit_id)
        return entry is not None and entry.holder == worker

    def unit(self, unit_id: str) -> WorkUnit:
        """Return a unit by its id."""
        return self._entries[unit_id].unit

    def held_by(self, worker: str) -> tuple[str, ...]:
        """Return the ids of the units leased to `worker`."""
        return tuple(sorted(self._holders[worker].units))

    def attempts(self, unit_id: str) -> int:
        """Return the attempts charged to a unit."""
        return self._entries[unit_id].attempts

    def count(self, state: UnitState) -> int:
        """Return how many units are in `state`."""
        return self._counts[state]

    @property
    def unfinished(self) -> int:
        """Return how many units are neither done nor quarantined."""
        return self._counts[UnitState.QUEUED] + self._counts[UnitState.LEASED]

    @property
    def is_finished(self) -> bool:
        """Whether every unit is done or quarantined."""
        return self.unfinished == 0

    @property
    def is_queue_empty(self) -> bool:
        """Whether no unit waits for a worker."""
        return self._counts[UnitState.QUEUED] == 0

    def _charge(self, entry: _Entry) -> Blame:
        entry.attempts += 1
        quarantined = entry.attempts >= self._max_attempts
        if quarantined:
            self._move(entry, UnitState.ENDED)
        else:
            entry.alone = True
            self._requeue(entry)
        return Blame(entry.unit, entry.attempts, charged=True, quarantined=quarantined)

    def _hand_out(self, unit_id: str, worker: str) -> WorkUnit:
        entry = self._entries[unit_id]
        self._move(entry, UnitState.LEASED, worker)
        return entry.unit

    def _requeue(self, entry: _Entry) -> None:
        self._move(entry, UnitState.QUEUED)
        queue = self._suspects if entry.alone else self._queue
        heapq.heappush(queue, (entry.rank, entry.unit.unit_id))

    def _move(self, entry: _Entry, state: UnitState, holder: str | None = None) -> None:
        if entry.holder is not None:
            self._holders[entry.holder].units.discard(entry.unit.unit_id)
        if holder is not None:
            self._holders[holder].units.add(entry.unit.unit_id)
        self._counts[entry.state] -= 1
        self._counts[state] += 1
        entry.state, entry.holder = state, holder

    def _first(self, queue: list[tuple[int, str]], *, alone: bool) -> str | None:
        """Return the first unit of a queue; remove the entries before it whose state has changed."""
        while queue:
            entry = self._entries[queue[0][1]]
            if entry.state is UnitState.QUEUED and entry.alone is alone:
                return entry.unit.unit_id
            heapq.heappop(queue)
        return None


def _no_blame(entry: _Entry) -> Blame:
    return Blame(entry.unit, entry.attempts, charged=False, quarantined=False)


class FailureLimits:
    """Decides when failures should stop a study.

    `allowed` samples may be quarantined, None for any number; `quarantined` ones are from before a restart.
    """

    def __init__(self, allowed: int | None, quarantined: int) -> None:
        self.quarantined = quarantined
        self.has_explained = False
        """Whether this call has made a sample."""
        self._allowed = allowed
        self._last_reason = ""
        self._message = ""
        self._alike = 0

    def gave_up(self, reason: str, message: str) -> None:
        """Count a row that was quarantined for an unexpected error."""
        self._alike = self._alike + 1 if reason == self._last_reason else 1
        self._last_reason, self._message = reason, message

    @property
    def reason_to_stop(self) -> str | None:
        """Return the reason to stop the study as a sentence, None to continue."""
        if self._alike >= SAME_FAILURES and not self.has_explained:
            return (
                f"the first {self._alike} rows all failed with {self._last_reason}: {self._message}; "
                "stopping early. Mend the cause, then try them again with retry"
            )
        if self._allowed is not None and self.quarantined > self._allowed:
            counts = f"{self.quarantined} sample(s) were quarantined and {self._allowed} are allowed"
            return f"{counts}; stopping early"
        return None
