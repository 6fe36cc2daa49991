"""The engine: batches prompts of many rows into forward passes on one device thread."""

import asyncio
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import (
    Answer,
    BoundsBatches,
    Decoding,
    EmbeddingMode,
    EncodesTogether,
    EngineStats,
    EngineStoppedError,
    Forcing,
    Likelihood,
    Model,
    OrdersPrompts,
    OutOfMemory,
    Prompt,
)
from mllm_shapx.models.batch_size import LARGEST_SIZE, BatchSizer
from mllm_shapx.models.engine_queue import (
    AnswerCall,
    Batch,
    DeviceQueue,
    EmbedJob,
    ForcingCall,
    ForcingJob,
    ForwardJob,
    Item,
    Request,
)
from mllm_shapx.models.flight import MOST_ROWS
from mllm_shapx.models.likelihood_batches import SIZE, encode_batches

_log = logging.getLogger(__name__)

EMBED_BATCH = 128
"""Answers per embedding batch."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that the model answered."""

    prompts: int
    seconds: float
    positions: int
    """Prompt positions without padding."""
    padded_positions: int
    """Positions with padding."""
    new_tokens: int


@dataclass(slots=True)
class _Counters:
    prompts: int = 0
    batches: int = 0
    busy: float = 0.0
    encoding: float = 0.0
    positions: int = 0
    padded: int = 0
    out_of_memory: int = 0


class Engine:
    """Answers prompts of many concurrent callers with one model, batched.

    Calls that arrive together share batches, ordered by the model's `batch_key` (else by length). Earlier
    calls come first. One thread runs the model while another encodes the next prompts. Several event loops
    may use the engine.

    Args:
        model: The loaded model; the engine owns it and closes it.
        batch_size: Prompts of a batch; None for the model's own setting.
        on_batch: Called on the device thread after each batch.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        self.model = model
        self._on_batch = on_batch
        largest = model.largest_batch if isinstance(model, BoundsBatches) else LARGEST_SIZE
        fixed = batch_size or model.max_batch_size
        self._sizer = BatchSizer(fixed, largest)
        self._batch_key = model.batch_key if isinstance(model, OrdersPrompts) else _longest_first
        self._encode_together = model.encode_all if isinstance(model, EncodesTogether) else self._encode_each
        self._queue = DeviceQueue(self._sizer, may_stretch=fixed is None)
        self._counters = _Counters()
        self._arriving = threading.Lock()
        self._arrivals: dict[asyncio.AbstractEventLoop, list[AnswerCall | ForcingCall]] = {}
        self._to_encode: queue.SimpleQueue[list[AnswerCall | ForcingCall] | None] = queue.SimpleQueue()
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()
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
        """See `PromptEngine.stats`."""
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

    @property
    def waiting_for(self) -> str:
        """Return an empty text: the device is always available."""
        return ""

    @property
    def most_rows(self) -> int:
        """See `PromptEngine.most_rows`."""
        return MOST_ROWS

    def order(self, snapshot: ConversationSnapshot) -> int:
        """Return a key that puts long prompts first, so that batches are even."""
        return -sum(len(message.text) for message in snapshot.messages())

    async def answer(
        self,
        snapshots: Sequence[ConversationSnapshot],
        decoding: Decoding,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """See `PromptEngine.answer`."""
        if len(seeds) != len(snapshots):
            raise ValueError(f"{len(snapshots)} prompts need as many seeds, not {len(seeds)}")
        if not snapshots:
            return []
        request = Request.create(len(snapshots), on_answer)
        self._arrive(AnswerCall(request, snapshots, decoding, seeds))
        return await request.wait()

    async def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        """See `PromptEngine.embed`."""
        if not answers:
            return []
        request = Request.create(len(answers))
        jobs = [
            EmbedJob(request, first, answers[first : first + EMBED_BATCH], mode, reducer)
            for first in range(0, len(answers), EMBED_BATCH)
        ]
        self._requests.add(request)
        self._queue.put_jobs(jobs)
        return await request.wait()

    async def likelihoods(
        self, forcing: Forcing, on_likelihood: Callable[[int, Likelihood], None] | None = None
    ) -> list[Likelihood]:
        """See `PromptEngine.likelihoods`."""
        if not forcing.snapshots:
            return []
        request = Request.create(len(forcing.snapshots), on_likelihood)
        self._arrive(ForcingCall(request, forcing))
        return await request.wait()

    async def aclose(self, *, keep_model: bool = False) -> None:
        """See `PromptEngine.aclose`. The current batch is finished first."""
        await asyncio.to_thread(self.close, keep_model=keep_model)

    def close(self, *, keep_model: bool = False) -> None:
        """Close as `aclose` does, outside an event loop."""
        if not self._stop(ModelError("the model's engine is closed: it answers no more prompts")):
            return
        self._encoder.join()
        self._device.join()
        if not keep_model:
            self.model.close()

    def _stop(self, error: Exception) -> bool:
        """Refuse new calls and fail the waiting ones; return whether the engine was open."""
        with self._arriving:
            waiting = self._queue.close(error)
            if waiting is None:
                return False
            waiting.update(call.request for calls in self._arrivals.values() for call in calls)
            self._arrivals.clear()
        self._to_encode.put(None)
        for request in waiting:
            request.fail(error)
        return True

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run one thread's work; on an error, fail the callers instead of leaving them waiting."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 -- nobody else would notice a thread's error
            failure = EngineStoppedError(f"the model's engine stopped working: {error!r}")
            failure.__cause__ = error
            _log.warning("the model's engine stopped working", exc_info=True)
            self._stop(failure)
            for request in set(self._requests):  # includes those of the current batch
                request.fail(failure)

    # --- event loop: collects calls of the same moment, so that single prompts share batches

    def _arrive(self, call: AnswerCall | ForcingCall) -> None:
        loop = call.request.loop
        with self._arriving:
            self._queue.check_open()
            self._requests.add(call.request)
            calls = self._arrivals.setdefault(loop, [])
            calls.append(call)
        if len(calls) == 1:
            loop.call_soon(self._flush, loop)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._arriving:
            calls = self._arrivals.pop(loop, [])
            self._queue.expect(len(calls))
        self._to_encode.put(calls)

    # --- encoding thread

    def _encode_all(self) -> None:
        for arrival in itertools.count():
            calls = self._to_encode.get()
            if calls is None:
                return
            for call in calls:
                try:
                    if isinstance(call, ForcingCall):
                        self._encode_forcing(call)
                    else:
                        self._encode(arrival, call)
                finally:
                    self._queue.encoded()

    def _encode(self, arrival: int, call: AnswerCall) -> None:
        """Queue the prompts of one call in pieces, so that the device starts with the first piece."""
        piece = self._sizer.size
        first = 0
        while first < len(call.snapshots):
            if call.request.dropped or self._queue.closed_by is not None:
                break
            started = time.perf_counter()
            try:
                prompts = self._encode_together(call.snapshots[first : first + piece], call.decoding)
                items = [
                    (self._batch_key(prompt), Item(call.request, index, prompt, call.seeds[index]))
                    for index, prompt in enumerate(prompts, start=first)
                ]
            except Exception as error:  # noqa: BLE001 -- the caller gets the error
                call.request.fail(error)
                return
            self._counters.encoding += time.perf_counter() - started
            self._queue.put(arrival, call.decoding, items)
            # One batch is enough to start. More waiting prompts give better sorted batches.
            first, piece = first + piece, 4 * piece
        if self._queue.closed_by is not None:
            call.request.fail(self._queue.closed_by)

    def _encode_forcing(self, call: ForcingCall) -> None:
        """Queue the batches of one call."""
        if call.request.dropped:
            return
        size = self.model.max_batch_size or max(SIZE, self._sizer.size)
        started = time.perf_counter()
        try:
            batches = encode_batches(self._encode_together, call.forcing, self._batch_key, size)
            self._counters.encoding += time.perf_counter() - started
            self._queue.put_jobs([ForcingJob(call.request, batch) for batch in batches])
        except Exception as error:  # noqa: BLE001 -- the caller gets the error
            call.request.fail(error)

    def _encode_each(self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding) -> Sequence[Prompt]:
        return [self.model.encode(snapshot, decoding) for snapshot in snapshots]

    # --- device thread

    def _run_all(self) -> None:
        while (job := self._queue.next_job()) is not None:
            if isinstance(job, Batch):
                self._answer(job)
            else:
                self._forward(job)

    def _answer(self, batch: Batch) -> None:
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
        except Exception as error:  # noqa: BLE001 -- the batch's callers get the error
            self._counters.busy += time.perf_counter() - started
            self._blame(batch, error)
            return
        found: dict[Request, list[tuple[int, Answer]]] = {}
        for item, answer in zip(items, answers, strict=True):
            found.setdefault(item.request, []).append((item.index, answer))
        for request, delivery in found.items():
            request.deliver(delivery)

    def _blame(self, batch: Batch, error: Exception) -> None:
        """Fail the request of a failed batch; if several requests share the batch, repeat each alone."""
        batches = batch.by_request()
        if len(batches) == 1:
            batch.items[0].request.fail(error)
            return
        for each in batches:
            self._answer(each)

    def _shrink(self, batch: Batch, error: BaseException) -> None:
        """Queue a batch that did not fit again, for smaller batches; fail a single prompt."""
        items = batch.items
        longest = max(item.prompt.length for item in items) + batch.decoding.max_new_tokens
        self._counters.out_of_memory += 1
        if len(items) == 1:
            items[0].request.fail(_too_long(self.model, items[0].prompt.length, batch.decoding, error))
            return
        self._sizer.too_large(len(items), longest)
        self._queue.put_back(batch)

    def _count(self, batch: Batch, answers: Sequence[Answer], seconds: float) -> None:
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

    def _forward(self, job: ForwardJob) -> None:
        if job.request.dropped:
            return
        started = time.perf_counter()
        try:
            found = job.run(self.model, self._count_halving)
        except Exception as error:  # noqa: BLE001 -- the caller gets the error
            job.request.fail(error)
        else:
            job.request.deliver(found)
        self._counters.busy += time.perf_counter() - started

    def _count_halving(self) -> None:
        self._counters.out_of_memory += 1


def _longest_first(prompt: Prompt) -> int:
    return -prompt.length


def _too_long(model: Model, length: int, decoding: Decoding, error: BaseException) -> ModelError:
    known = model.identity
    failure = ModelError(
        f"model {known.model_id!r} on {known.device}: the memory does not hold one prompt of {length} "
        f"positions with {decoding.max_new_tokens} new tokens; lower generation.max_new_tokens, use a "
        "smaller dtype (connector_kwargs.dtype), fewer workers per device, or a device with more memory"
    )
    failure.__cause__ = error
    return failure
