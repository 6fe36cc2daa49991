"""The engine: many awaiting prompts of many rows become a few forward passes on one device thread."""

import asyncio
import heapq
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import Answer, Decoding, EmbeddingMode, Likelihood, Model, OutOfMemory, Prompt
from mllm_shapx.models.batch_size import LARGEST_SIZE, BatchSizer
from mllm_shapx.models.likelihood_batches import SIZE, Forcing, LikelihoodBatch, encode_batches, read_batch

_log = logging.getLogger(__name__)

EMBED_BATCH = 128
"""Answers embedded in one go."""
STRETCH = 1.25
"""How much larger than the batch size a batch may be when that finishes all that waits."""


class EngineStoppedError(RuntimeError):
    """A thread of the engine ended with an error that nothing expected: no prompt is to blame for it."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that the model answered."""

    prompts: int
    seconds: float
    positions: int
    """Prompt positions without padding."""
    padded_positions: int
    """Positions of the rectangle that holds the prompts."""
    new_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine has done so far."""

    prompts: int
    batches: int
    busy_seconds: float
    """Time that the device thread spent in the model."""
    encode_seconds: float
    """Time that the encoding thread spent in the model's `encode`."""
    padding_share: float
    """Share of the batches' prompt positions that were padding, in [0, 1]."""
    batch_size: int
    """Prompts per batch at present."""
    out_of_memory: int
    """Batches that did not fit and were redone in halves."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Request:
    """One call of the engine and what it waits for."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[list[Any]]"
    results: list[Any]
    remaining: int
    on_result: Callable[[int, Any], None] | None
    dropped: bool = False
    """Nobody waits any more: cancelled or failed."""

    @classmethod
    def create(cls, size: int, on_result: Callable[[int, Any], None] | None = None) -> "_Request":
        loop = asyncio.get_running_loop()
        return cls(loop, loop.create_future(), [None] * size, size, on_result)

    def deliver(self, found: Sequence[tuple[int, Any]]) -> None:
        """Hand over results from any thread."""
        self._call(self._accept, found)

    def fail(self, error: Exception) -> None:
        """Fail the whole call from any thread; its pending prompts are dropped."""
        self.dropped = True
        self._call(self._reject, error)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the caller's loop is closed: nobody waits
            self.dropped = True

    def _accept(self, found: Sequence[tuple[int, Any]]) -> None:
        if self.future.done():
            return
        try:
            for index, result in found:
                self.results[index] = result
                if self.on_result is not None:
                    self.on_result(index, result)
        except Exception as error:  # noqa: BLE001 -- the callback is the caller's: its error is the caller's
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
class _AnswerCall:
    """What the encoding thread gets: the prompts of one request."""

    request: _Request
    snapshots: Sequence[ConversationSnapshot]
    decoding: Decoding
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class _ForcingCall:
    """What the encoding thread gets of `Engine.likelihoods`."""

    request: _Request
    forcing: Forcing


@dataclass(frozen=True, slots=True)
class _ForcingJob:
    """Prompts of one request whose continuations are read in one go."""

    request: _Request
    batch: LikelihoodBatch


@dataclass(frozen=True, slots=True)
class _Item:
    """One encoded prompt that waits for the device."""

    request: _Request
    index: int
    prompt: Prompt
    seed: int


@dataclass(frozen=True, slots=True)
class _EmbedJob:
    """Some answers of one request to be embedded in one go."""

    request: _Request
    first: int
    answers: Sequence[Answer]
    mode: EmbeddingMode
    reducer: str


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts taken from the queue for one forward pass."""

    decoding: Decoding
    entries: list[tuple[int, Any, int, _Item]]
    """Heap entries, so that a batch that did not fit goes back as it was."""

    @property
    def items(self) -> list[_Item]:
        return [entry[3] for entry in self.entries]


@dataclass(slots=True)
class _Counters:
    prompts: int = 0
    batches: int = 0
    busy: float = 0.0
    encoding: float = 0.0
    positions: int = 0
    padded: int = 0
    out_of_memory: int = 0


@dataclass(slots=True)
class _Queue:
    """All that waits for the device. Guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    heaps: dict[Decoding, list[tuple[int, Any, int, _Item]]] = field(default_factory=dict)
    jobs: list[_EmbedJob | _ForcingJob] = field(default_factory=list)
    """What a forward pass without generating answers; it goes first."""
    encoding: int = 0
    """Calls that are being encoded: more prompts are about to come."""
    closed: bool = False


class Engine:
    """Answers prompts of many concurrent callers with one model, batched.

    Calls that arrive together are batched together: first come, first served between them, ordered inside
    by the model's `batch_key` (else by length), so that a batch is of one kind. One thread runs the model,
    another encodes the next prompts meanwhile. The engine may be used from several event loops.

    Args:
        model: The loaded model; the engine owns it and closes it.
        on_batch: Called on the device thread after each batch.
    """

    def __init__(self, model: Model, *, on_batch: Callable[[BatchReport], None] | None = None) -> None:
        self.model = model
        self._on_batch = on_batch
        self._sizer = BatchSizer(model.max_batch_size, getattr(model, "largest_batch", LARGEST_SIZE))
        self._batch_key: Callable[[Any], Any] = getattr(model, "batch_key", _longest_first)
        self._queue = _Queue()
        self._counters = _Counters()
        self._arrivals: dict[asyncio.AbstractEventLoop, list[_AnswerCall | _ForcingCall]] = {}
        self._to_encode: queue.SimpleQueue[list[_AnswerCall | _ForcingCall] | None] = queue.SimpleQueue()
        self._sequence = itertools.count()
        self._closed_by: Exception = _closed()
        self._requests: weakref.WeakSet[_Request] = weakref.WeakSet()
        self._encoder = threading.Thread(
            target=self._guarded, args=(self._encode_all,), name="shapx-encode", daemon=True
        )
        self._device = threading.Thread(
            target=self._guarded, args=(self._run_all,), name="shapx-device", daemon=True
        )
        self._encoder.start()
        self._device.start()

    @property
    def stats(self) -> EngineStats:
        """Return what has been done so far."""
        seen = self._counters
        return EngineStats(
            prompts=seen.prompts,
            batches=seen.batches,
            busy_seconds=seen.busy,
            encode_seconds=seen.encoding,
            padding_share=1.0 - seen.positions / seen.padded if seen.padded else 0.0,
            batch_size=self._sizer.size,
            out_of_memory=seen.out_of_memory,
        )

    async def answer(
        self,
        snapshots: Sequence[ConversationSnapshot],
        decoding: Decoding,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer `snapshots`, in their order; `seeds[i]` decides the draws of snapshot i.

        `on_answer(i, answer)` is called in the caller's loop as answers come in. Cancelling the call drops
        the prompts that no batch has taken yet.

        Raises:
            ModelError: When one prompt alone does not fit in the device's memory, or the engine is closed.
            EngineStoppedError: When the engine itself broke, now or at an earlier call.
            Exception: Whatever the model raised for a batch that held one of these prompts.
        """
        if len(seeds) != len(snapshots):
            raise ValueError(f"{len(snapshots)} prompts need as many seeds, not {len(seeds)}")
        if not snapshots:
            return []
        request = _Request.create(len(snapshots), on_answer)
        self._arrive(_AnswerCall(request, snapshots, decoding, seeds))
        return await _result(request)

    async def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        """Return one vector per answer from the model's own states (see `Model.embed`)."""
        if not answers:
            return []
        request = _Request.create(len(answers))
        jobs = [
            _EmbedJob(request, first, answers[first : first + EMBED_BATCH], mode, reducer)
            for first in range(0, len(answers), EMBED_BATCH)
        ]
        with self._queue.changed:
            self._check_open()
            self._requests.add(request)
            self._queue.jobs.extend(jobs)
            self._queue.changed.notify_all()
        return await _result(request)

    async def likelihoods(
        self, forcing: Forcing, on_likelihood: Callable[[int, Likelihood], None] | None = None
    ) -> list[Likelihood]:
        """Return how likely each continuation is behind its prompt, in the order of `forcing`.

        `on_likelihood(i, likelihood)` is called in the caller's loop as they come in.

        Raises:
            ModelError: When one prompt alone does not fit in the device's memory, the model's forward pass
                does not give its probabilities, or the engine is closed.
            RowError: When a prompt cannot be encoded or leaves no room for its continuation.
        """
        if not forcing.snapshots:
            return []
        request = _Request.create(len(forcing.snapshots), on_likelihood)
        self._arrive(_ForcingCall(request, forcing))
        return await _result(request)

    async def aclose(self) -> None:
        """Stop the threads after the batch in hand, fail what still waits, and close the model."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Close as `aclose` does, from outside an event loop."""
        if not self._stop(_closed()):
            return
        self._encoder.join()
        self._device.join()
        self.model.close()

    def _stop(self, error: Exception) -> bool:
        """Take no more work and fail what waits; say whether the engine was open."""
        with self._queue.changed:
            if self._queue.closed:
                return False
            self._queue.closed, self._closed_by = True, error
            waiting = self._waiting_requests()
            self._queue.changed.notify_all()
        self._to_encode.put(None)
        for request in waiting:
            request.fail(error)
        return True

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run one thread's work; should it ever break, its callers learn of it instead of waiting forever."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 -- nobody else would hear of it
            failure = EngineStoppedError(f"the model's engine stopped working: {error!r}")
            failure.__cause__ = error
            _log.warning("the model's engine stopped working", exc_info=True)
            self._stop(failure)
            for request in set(self._requests):  # those of the batch in hand too
                request.fail(failure)

    def _waiting_requests(self) -> set[_Request]:
        found = {entry[3].request for heap in self._queue.heaps.values() for entry in heap}
        found.update(job.request for job in self._queue.jobs)
        found.update(call.request for calls in self._arrivals.values() for call in calls)
        self._queue.heaps.clear()
        self._queue.jobs.clear()
        self._arrivals.clear()
        return found

    def _check_open(self) -> None:
        if self._queue.closed:
            raise self._closed_by

    # --- event loop: calls of the same moment are collected, so that single prompts share batches

    def _arrive(self, call: _AnswerCall | _ForcingCall) -> None:
        loop = call.request.loop
        with self._queue.changed:
            self._check_open()
            self._requests.add(call.request)
            calls = self._arrivals.setdefault(loop, [])
            calls.append(call)
        if len(calls) == 1:
            loop.call_soon(self._flush, loop)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._queue.changed:
            calls = self._arrivals.pop(loop, [])
            self._queue.encoding += len(calls)
        self._to_encode.put(calls)

    # --- encoding thread

    def _encode_all(self) -> None:
        for flush in itertools.count():
            calls = self._to_encode.get()
            if calls is None:
                return
            for call in calls:
                try:
                    if isinstance(call, _ForcingCall):
                        self._encode_forcing(call)
                    else:
                        self._encode(flush, call)
                finally:
                    with self._queue.changed:
                        self._queue.encoding -= 1
                        self._queue.changed.notify_all()

    def _encode(self, flush: int, call: _AnswerCall) -> None:
        """Queue the prompts of one call, a piece at a time, so that the device starts on the first."""
        piece = self._sizer.size
        first = 0
        while first < len(call.snapshots):
            if call.request.dropped or self._queue.closed:
                break
            started = time.perf_counter()
            try:
                entries = self._entries(flush, call, first, piece)
            except Exception as error:  # noqa: BLE001 -- it is the caller's prompt: the caller gets the error
                call.request.fail(error)
                return
            self._counters.encoding += time.perf_counter() - started
            with self._queue.changed:
                heap = self._queue.heaps.setdefault(call.decoding, [])
                for entry in entries:
                    heapq.heappush(heap, entry)
                self._queue.changed.notify_all()
            # One batch is enough to start on; the more wait together, the better batches are composed.
            first, piece = first + piece, 4 * piece
        if self._queue.closed:
            call.request.fail(self._closed_by)

    def _encode_forcing(self, call: _ForcingCall) -> None:
        """Queue the batches of one call."""
        if call.request.dropped:
            return
        size = self.model.max_batch_size or max(SIZE, self._sizer.size)
        started = time.perf_counter()
        try:
            batches = encode_batches(self.model, call.forcing, self._batch_key, size)
        except Exception as error:  # noqa: BLE001 -- it is the caller's prompt: the caller gets the error
            call.request.fail(error)
            return
        self._counters.encoding += time.perf_counter() - started
        with self._queue.changed:
            self._queue.jobs.extend(_ForcingJob(call.request, batch) for batch in batches)
            self._queue.changed.notify_all()
        if self._queue.closed:
            call.request.fail(self._closed_by)

    def _entries(
        self, flush: int, call: _AnswerCall, first: int, count: int
    ) -> list[tuple[int, Any, int, _Item]]:
        key = self._batch_key
        prompts = self._encode_piece(call.snapshots[first : first + count], call.decoding)
        entries = []
        for index, prompt in enumerate(prompts, start=first):
            item = _Item(call.request, index, prompt, call.seeds[index])
            entries.append((flush, key(prompt), next(self._sequence), item))
        return entries

    def _encode_piece(
        self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding
    ) -> Sequence[Prompt]:
        together = getattr(self.model, "encode_all", None)
        if together is None:
            return [self.model.encode(snapshot, decoding) for snapshot in snapshots]
        prompts: Sequence[Prompt] = together(snapshots, decoding)
        return prompts

    # --- device thread

    def _run_all(self) -> None:
        while (job := self._next_job()) is not None:
            if isinstance(job, _EmbedJob):
                self._embed(job)
            elif isinstance(job, _ForcingJob):
                self._force(job)
            else:
                self._answer(job)

    def _next_job(self) -> _EmbedJob | _ForcingJob | _Batch | None:
        """Wait for work: forward passes first (a row waits for them to end), else the oldest prompts."""
        with self._queue.changed:
            while not self._queue.closed:
                if self._queue.jobs:
                    return self._queue.jobs.pop(0)
                batch = self._take_batch()
                if batch is not None:
                    return batch
                self._queue.changed.wait()
        return None

    def _take_batch(self) -> _Batch | None:
        heaps = self._queue.heaps
        for decoding in [decoding for decoding, heap in heaps.items() if not _drop_unwanted(heap)]:
            del heaps[decoding]
        if not heaps:
            return None
        decoding = min(heaps, key=lambda each: heaps[each][0][:1])
        heap = heaps[decoding]
        size = self._sizer.size_for(decoding)
        if self._queue.encoding and len(heap) < size:
            return None  # more is on its way, and soon
        if self.model.max_batch_size is None and len(heap) <= STRETCH * size:
            size = len(heap)
        return _Batch(decoding, self._pop(heap, size, decoding.max_new_tokens))

    def _pop(
        self, heap: list[tuple[int, Any, int, _Item]], size: int, new_tokens: int
    ) -> list[tuple[int, Any, int, _Item]]:
        entries: list[tuple[int, Any, int, _Item]] = []
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

    def _answer(self, batch: _Batch) -> None:
        items = batch.items
        prompts = [item.prompt for item in items]
        started = time.perf_counter()
        try:
            answers = self.model.answer(prompts, batch.decoding, [item.seed for item in items])
            self._count(batch, answers, time.perf_counter() - started)
        except (OutOfMemory, MemoryError) as error:
            self._counters.busy += time.perf_counter() - started
            self._shrink(batch, error)
            return
        except Exception as error:  # noqa: BLE001 -- handed to the callers of this batch
            self._counters.busy += time.perf_counter() - started
            self._blame(batch, error)
            return
        found: dict[_Request, list[tuple[int, Answer]]] = {}
        for item, answer in zip(items, answers, strict=True):
            found.setdefault(item.request, []).append((item.index, answer))
        for request, delivery in found.items():
            request.deliver(delivery)

    def _blame(self, batch: _Batch, error: Exception) -> None:
        """Fail the request whose prompts a batch failed at; who only shared the batch is answered alone."""
        by_request: dict[_Request, list[tuple[int, Any, int, _Item]]] = {}
        for entry in batch.entries:
            by_request.setdefault(entry[3].request, []).append(entry)
        if len(by_request) == 1:
            batch.items[0].request.fail(error)
            return
        for entries in by_request.values():
            self._answer(_Batch(batch.decoding, entries))

    def _shrink(self, batch: _Batch, error: BaseException) -> None:
        """Put a batch that did not fit back into the queue, to be taken in halves."""
        items = batch.items
        longest = max(item.prompt.length for item in items) + batch.decoding.max_new_tokens
        self._counters.out_of_memory += 1
        if len(items) == 1:
            items[0].request.fail(_too_long(self.model, items[0].prompt.length, batch.decoding, error))
            return
        self._sizer.too_large(len(items), longest)
        with self._queue.changed:
            heap = self._queue.heaps.setdefault(batch.decoding, [])
            for entry in batch.entries:
                heapq.heappush(heap, entry)

    def _count(self, batch: _Batch, answers: Sequence[Answer], seconds: float) -> None:
        lengths = [item.prompt.length for item in batch.items]
        new_tokens = sum(len(answer.token_ids) + len(answer.audio_frames) for answer in answers)
        report = BatchReport(
            prompts=len(lengths),
            seconds=seconds,
            positions=sum(lengths),
            padded_positions=max(lengths) * len(lengths),
            new_tokens=new_tokens,
        )
        self._sizer.observe(batch.decoding, report.prompts, report.positions + new_tokens, seconds)
        seen = self._counters
        seen.prompts += report.prompts
        seen.batches += 1
        seen.busy += seconds
        seen.positions += report.positions
        seen.padded += report.padded_positions
        if self._on_batch is not None:
            self._on_batch(report)

    def _embed(self, job: _EmbedJob) -> None:
        if job.request.dropped:
            return
        started = time.perf_counter()
        try:
            vectors = self._embed_halving(job.answers, job.mode, job.reducer)
        except Exception as error:  # noqa: BLE001 -- handed to the caller
            job.request.fail(error)
        else:
            job.request.deliver(list(enumerate(vectors, start=job.first)))
        self._counters.busy += time.perf_counter() - started

    def _force(self, job: _ForcingJob) -> None:
        if job.request.dropped:
            return
        started = time.perf_counter()
        try:
            found = read_batch(self.model, job.batch, self._count_halving)
        except Exception as error:  # noqa: BLE001 -- handed to the caller
            job.request.fail(error)
        else:
            job.request.deliver(list(zip(job.batch.places, found, strict=True)))
        self._counters.busy += time.perf_counter() - started

    def _count_halving(self) -> None:
        self._counters.out_of_memory += 1

    def _embed_halving(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        try:
            return self.model.embed(answers, mode, reducer)
        except (OutOfMemory, MemoryError) as error:
            self._count_halving()
            if len(answers) == 1:
                raise ModelError(
                    f"model {self.model.identity.model_id!r}: the memory does not hold one answer of "
                    f"{len(answers[0].token_ids)} tokens to embed; use a smaller dtype or a larger device"
                ) from error
        half = len(answers) // 2
        return [
            *self._embed_halving(answers[:half], mode, reducer),
            *self._embed_halving(answers[half:], mode, reducer),
        ]


def _longest_first(prompt: Prompt) -> int:
    return -prompt.length


def _drop_unwanted(heap: list[tuple[int, Any, int, _Item]]) -> bool:
    """Pop prompts nobody waits for from the top; say whether any is left."""
    while heap and heap[0][3].request.dropped:
        heapq.heappop(heap)
    return bool(heap)


async def _result(request: _Request) -> list[Any]:
    try:
        return await request.future
    except asyncio.CancelledError:
        request.dropped = True
        raise


def _closed() -> ModelError:
    return ModelError("the model's engine is closed: it answers no more prompts")


def _too_long(model: Model, length: int, decoding: Decoding, error: BaseException) -> ModelError:
    identity = model.identity
    failure = ModelError(
        f"model {identity.model_id!r} on {identity.device}: the memory does not hold one prompt of {length} "
        f"positions with {decoding.max_new_tokens} new tokens; lower generation.max_new_tokens, use a "
        "smaller dtype (connector_kwargs.dtype), fewer workers per device, or a device with more memory"
    )
    failure.__cause__ = error
    return failure
