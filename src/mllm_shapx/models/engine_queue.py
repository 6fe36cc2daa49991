"""The engine's requests, and the queue of prompts and jobs for the device."""

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import Decoding, OutOfMemory, Prompt
from mllm_shapx.models.batch_size import BatchSizer

STRETCH = 1.25
"""A batch may exceed the batch size by this factor if it then takes all waiting prompts."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One call of the engine, and its results so far."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[list[Any]]"
    results: list[Any]
    remaining: int
    on_result: Callable[[int, Any], None] | None
    dropped: bool = False
    """Whether the call is cancelled or failed: its prompts need no answer."""

    @classmethod
    def create(cls, size: int, on_result: Callable[[int, Any], None] | None = None) -> "Request":
        """Return a request of the running event loop for `size` results."""
        loop = asyncio.get_running_loop()
        return cls(loop, loop.create_future(), [None] * size, size, on_result)

    async def wait(self) -> list[Any]:
        """Wait for all results and return them; a cancelled call drops its pending prompts."""
        try:
            return await self.future
        except asyncio.CancelledError:
            self.dropped = True
            raise

    def deliver(self, found: Sequence[tuple[int, Any]]) -> None:
        """Deliver results; may be called from any thread."""
        self._call(self._accept, found)

    def fail(self, error: Exception) -> None:
        """Fail the whole call and drop its pending prompts; may be called from any thread."""
        self.dropped = True
        self._call(self._reject, error)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the caller's loop is closed
            self.dropped = True

    def _accept(self, found: Sequence[tuple[int, Any]]) -> None:
        if self.future.done():
            return
        try:
            for index, result in found:
                self.results[index] = result
                if self.on_result is not None:
                    self.on_result(index, result)
        except Exception as error:  # noqa: BLE001 -- the caller gets its callback's error
            self.dropped = True
            self.future.set_exception(error)
            return
        self.remaining -= len(found)
        if self.remaining == 0:
            self.future.set_result(self.results)

    def _reject(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded prompt that waits for the device."""

    request: Request
    index: int
    prompt: Prompt
    seed: int


Entry = tuple[int, Any, int, Item]
"""(arrival, batch key, number, item): the sort key of the queue."""


@dataclass(frozen=True, slots=True)
class ForwardJob:
    """Some results of one request that need forward passes without generation."""

    request: Request
    places: Sequence[int]
    """Indices of the results in the request."""
    read: Callable[[Sequence[int]], Sequence[Any]]
    """Returns the results at some of these indices, from one forward pass."""
    too_large: Callable[[int], str]
    """Returns the message for a result that does not fit in the device's memory alone."""

    def run(self) -> list[tuple[int, Any]]:
        """Return the results with their indices; what does not fit in memory is read in halves.

        Raises:
            ModelError: When a single result does not fit.
        """
        return list(zip(self.places, self._read(self.places), strict=True))

    def _read(self, places: Sequence[int]) -> Sequence[Any]:
        try:
            return self.read(places)
        except (OutOfMemory, MemoryError) as error:
            if len(places) == 1:
                raise ModelError(self.too_large(places[0])) from error
        half = len(places) // 2
        return [*self._read(places[:half]), *self._read(places[half:])]


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts taken from the queue for one forward pass."""

    decoding: Decoding
    entries: list[Entry]
    """Entries, so that a batch that did not fit returns to its place in the queue."""

    @property
    def items(self) -> list[Item]:
        """Return the prompts."""
        return [entry[3] for entry in self.entries]

    def by_request(self) -> list["Batch"]:
        """Return one batch per request in this batch."""
        found: dict[Request, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry[3].request, []).append(entry)
        return [Batch(self.decoding, entries) for entries in found.values()]


class DeviceQueue:
    """Prompts and jobs that wait for the device. Its methods may be called from any thread.

    Prompts with equal decoding share batches, first come, first served. Prompts that arrived together are
    ordered by the model's batch key.

    Args:
        sizer: Chooses the batch size.
        may_stretch: Whether a slightly larger batch may take all waiting prompts (`STRETCH`).
    """

    def __init__(self, sizer: BatchSizer, *, may_stretch: bool) -> None:
        self._sizer = sizer
        self._may_stretch = may_stretch
        self._changed = threading.Condition()
        self._heaps: dict[Decoding, list[Entry]] = {}
        self._jobs: list[ForwardJob] = []
        self._encoding = 0
        self._closed_by: Exception | None = None
        self._numbers = itertools.count()

    def check_open(self) -> None:
        """Raise the error that closed the queue."""
        if self._closed_by is not None:
            raise self._closed_by

    def close(self, error: Exception) -> set[Request] | None:
        """Refuse new work; return the waiting requests, None if the queue was closed before."""
        with self._changed:
            if self._closed_by is not None:
                return None
            self._closed_by = error
            found = {entry[3].request for heap in self._heaps.values() for entry in heap}
            found.update(job.request for job in self._jobs)
            self._heaps.clear()
            self._jobs.clear()
            self._changed.notify_all()
        return found

    def expect(self, calls: int) -> None:
        """Announce `calls` calls that are about to be encoded; each ends with `encoded`."""
        with self._changed:
            self._encoding += calls

    def encoded(self) -> None:
        """Report that one announced call is encoded."""
        with self._changed:
            self._encoding -= 1
            self._changed.notify_all()

    def put(self, arrival: int, decoding: Decoding, items: Sequence[tuple[Any, Item]]) -> None:
        """Queue prompts, each with its batch key; `arrival` counts the moments at which calls come."""
        with self._changed:
            heap = self._heaps.setdefault(decoding, [])
            for key, item in items:
                heapq.heappush(heap, (arrival, key, next(self._numbers), item))
            self._changed.notify_all()

    def put_back(self, batch: Batch) -> None:
        """Queue a batch again in its old place."""
        with self._changed:
            heap = self._heaps.setdefault(batch.decoding, [])
            for entry in batch.entries:
                heapq.heappush(heap, entry)

    def put_jobs(self, jobs: Sequence[ForwardJob]) -> None:
        """Queue jobs of forward passes.

        Raises:
            Exception: The error that closed the queue.
        """
        with self._changed:
            self.check_open()
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def next_job(self) -> ForwardJob | Batch | None:
        """Wait for work and return it, None once the queue is closed.

        Jobs of forward passes come first, since a row cannot finish without them; then the oldest prompts.
        """
        with self._changed:
            while self._closed_by is None:
                if self._jobs:
                    return self._jobs.pop(0)
                batch = self._take_batch()
                if batch is not None:
                    return batch
                self._changed.wait()
        return None

    def _take_batch(self) -> Batch | None:
        for decoding in [each for each, heap in self._heaps.items() if not _has_wanted(heap)]:
            del self._heaps[decoding]
        if not self._heaps:
            return None
        decoding = min(self._heaps, key=lambda each: self._heaps[each][0][:1])
        heap = self._heaps[decoding]
        size = self._sizer.size_for(decoding)
        if self._encoding and len(heap) < size:
            return None  # more prompts are being encoded
        if self._may_stretch and len(heap) <= STRETCH * size:
            size = len(heap)
        return Batch(decoding, self._pop(heap, size, decoding.max_new_tokens))

    def _pop(self, heap: list[Entry], size: int, new_tokens: int) -> list[Entry]:
        entries: list[Entry] = []
        longest = 0
        while heap and len(entries) < size:
            item = heap[0][3]
            if not item.request.dropped:
                longest = max(longest, item.prompt.length + new_tokens)
                if not self._sizer.fits(len(entries) + 1, longest):
                    break
                entries.append(heap[0])
            heapq.heappop(heap)
        return entries


def _has_wanted(heap: list[Entry]) -> bool:
    """Remove dropped prompts from the top; return whether the heap still has prompts."""
    while heap and heap[0][3].request.dropped:
        heapq.heappop(heap)
    return bool(heap)
