"""The engine: batches prompts of many rows into forward passes on one device thread."""

import asyncio
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mllm_shap import ConversationSnapshot

from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import (
    Answer,
    ArrangesBatches,
    Decoding,
    EmbeddingMode,
    EngineStats,
    EngineStoppedError,
    Forcing,
    Likelihood,
    Model,
    OutOfMemory,
    Prompt,
    Vector,
)
from mllm_shapx.models.batch_size import LARGEST_SIZE, BatchSizer
from mllm_shapx.models.engine_queue import (
    Batch,
    DeviceQueue,
    ForwardJob,
    Item,
    Request,
)
from mllm_shapx.models.flight import MOST_ROWS

_log = logging.getLogger(__name__)

EMBED_BATCH = 128
"""Answers per embedding batch."""
LIKELIHOOD_BATCH = 128
"""Prompts per batch of likelihoods, unless the config or `auto` says more."""
_HELPS_MEMORY = (
    "smaller dtype (connector_kwargs.dtype), fewer workers per device, or a device with more memory"
)


Call = tuple[Request, Callable[[int], None]]
"""A request, and what encodes its prompts for the device, given the number of the moment at which it came."""


class Engine:
    """Answers prompts of many concurrent callers with one model, batched.

    Calls that arrive together share batches, ordered by the model's `batch_key` (else by length). Earlier
    calls come first. One thread runs the model while another encodes the next prompts. Several event loops
    may use the engine.

    Args:
        model: The loaded model; the engine owns it and closes it.
        batch_size: Prompts of a batch; None for the model's own setting.
    """

    waiting_for = ""
    """The device is always available."""
    most_rows = MOST_ROWS
    """See `PromptEngine.most_rows`."""

    def __init__(self, model: Model, *, batch_size: int | None = None) -> None:
        self.model = model
        if isinstance(model, ArrangesBatches):
            largest, self._batch_key = model.largest_batch, model.batch_key
            self._encode_together = model.encode_all
        else:
            largest, self._batch_key = LARGEST_SIZE, _longest_first
            self._encode_together = self._encode_each
        self._fixed_size = batch_size or model.max_batch_size
        self._sizer = BatchSizer(self._fixed_size, largest)
        self._queue = DeviceQueue(self._sizer, may_stretch=self._fixed_size is None)
        self._busy_seconds = self._encode_seconds = 0.0
        self._arriving = threading.Lock()
        self._arrivals: dict[asyncio.AbstractEventLoop, list[Call]] = {}
        self._to_encode: queue.SimpleQueue[list[Call] | None] = queue.SimpleQueue()
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("shapx-encode", self._encode_all), ("shapx-device", self._run_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> EngineStats:
        """See `PromptEngine.stats`."""
        return EngineStats(self._busy_seconds, self._sizer.size, self._encode_seconds)

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
        if not snapshots:
            return []
        request = Request.create(len(snapshots), on_answer)
        self._arrive(request, lambda arrival: self._encode(arrival, request, snapshots, decoding, seeds))
        return await request.wait()

    async def embed(self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str) -> list[Vector]:
        """See `PromptEngine.embed`."""
        if not answers:
            return []

        def read(places: Sequence[int]) -> Sequence[Vector]:
            return self.model.embed([answers[place] for place in places], mode, reducer)

        def too_large(place: int) -> str:
            return (
                f"model {self.model.identity.model_id!r}: the memory does not hold one answer of "
                f"{len(answers[place].token_ids)} tokens to embed; use a smaller dtype or a larger device"
            )

        request = Request.create(len(answers))
        self._requests.add(request)
        batches = itertools.batched(range(len(answers)), EMBED_BATCH)
        self._queue.put_jobs([ForwardJob(request, places, read, too_large) for places in batches])
        return await request.wait()

    async def likelihoods(
        self, forcing: Forcing, on_likelihood: Callable[[int, Likelihood], None] | None = None
    ) -> list[Likelihood]:
        """See `PromptEngine.likelihoods`."""
        if not forcing.snapshots:
            return []
        request = Request.create(len(forcing.snapshots), on_likelihood)
        self._arrive(request, lambda _: self._encode_forcing(request, forcing))
        return await request.wait()

    async def aclose(self, *, keep_model: bool = False) -> None:
        """See `PromptEngine.aclose`. The current batch is finished first."""
        await asyncio.to_thread(self.close, keep_model=keep_model)

    def close(self, *, keep_model: bool = False) -> None:
        """Close as `aclose` does, outside an event loop."""
        if not self._stop(ModelError("the model's engine is closed: it answers no more prompts")):
            return
        for thread in self._threads:
            thread.join()
        if not keep_model:
            self.model.close()

    def _stop(self, error: Exception) -> bool:
        """Refuse new calls and fail the waiting ones; return whether the engine was open."""
        with self._arriving:
            waiting = self._queue.close(error)
            if waiting is None:
                return False
            waiting.update(request for calls in self._arrivals.values() for request, _ in calls)
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

    def _arrive(self, request: Request, encode: Callable[[int], None]) -> None:
        loop = request.loop
        with self._arriving:
            self._queue.check_open()
            self._requests.add(request)
            calls = self._arrivals.setdefault(loop, [])
            calls.append((request, encode))
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
            for request, encode in calls:
                try:
                    if not request.dropped:
                        encode(arrival)
                except Exception as error:  # noqa: BLE001 -- the caller gets the error
                    request.fail(error)
                finally:
                    self._queue.encoded()

    def _encode(
        self,
        arrival: int,
        request: Request,
        snapshots: Sequence[ConversationSnapshot],
        decoding: Decoding,
        seeds: Sequence[int],
    ) -> None:
        """Queue the prompts of one call in pieces, so that the device starts with the first piece."""
        piece = self._sizer.size
        first = 0
        while first < len(snapshots) and not request.dropped:
            self._queue.check_open()
            started = time.perf_counter()
            prompts = self._encode_together(snapshots[first : first + piece], decoding)
            items = [
                (self._batch_key(prompt), Item(request, index, prompt, seeds[index]))
                for index, prompt in enumerate(prompts, start=first)
            ]
            self._encode_seconds += time.perf_counter() - started
            self._queue.put(arrival, decoding, items)
            # One batch is enough to start. More waiting prompts give better sorted batches.
            first, piece = first + piece, 4 * piece
        self._queue.check_open()

    def _encode_forcing(self, request: Request, forcing: Forcing) -> None:
        """Queue the prompts of one call with their continuations, in batches of like prompts."""
        started = time.perf_counter()
        model: Any = self.model
        given = forcing.continuations
        decoding = replace(forcing.decoding, max_new_tokens=max(map(len, given)))
        prompts = self._encode_together(forcing.snapshots, decoding)
        order = sorted(range(len(prompts)), key=lambda place: self._batch_key(prompts[place]))
        self._encode_seconds += time.perf_counter() - started

        def read(places: Sequence[int]) -> Sequence[Likelihood]:
            found: Sequence[Likelihood] = model.likelihoods(
                [prompts[place] for place in places], [given[place] for place in places], forcing.top_k
            )
            return found

        def too_large(place: int) -> str:
            return (
                f"model {model.identity.model_id!r} on {model.identity.device}: the memory does not hold one "
                f"prompt of {prompts[place].length} positions with an answer of {len(given[place])} tokens; "
                f"use a {_HELPS_MEMORY}"
            )

        size = self._fixed_size or max(LIKELIHOOD_BATCH, self._sizer.size)
        batches = itertools.batched(order, size)
        self._queue.put_jobs([ForwardJob(request, places, read, too_large) for places in batches])

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
        started = time.perf_counter()
        try:
            answers = self.model.answer(
                [item.prompt for item in items], batch.decoding, [item.seed for item in items]
            )
        except Exception as error:  # noqa: BLE001 -- the batch's callers get the error
            self._busy_seconds += time.perf_counter() - started
            if isinstance(error, OutOfMemory | MemoryError):
                self._shrink(batch, error)
            else:
                self._blame(batch, error)
            return
        seconds = time.perf_counter() - started
        self._busy_seconds += seconds
        new_tokens = sum(len(answer.token_ids) + len(answer.audio_frames) for answer in answers)
        positions = sum(item.prompt.length for item in items)
        self._sizer.observe(batch.decoding, len(items), positions + new_tokens, seconds)
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

    def _shrink(self, batch: Batch, error: Exception) -> None:
        """Queue a batch that did not fit again, for smaller batches; fail a single prompt."""
        longest = max(item.prompt.length for item in batch.items)
        new_tokens = batch.decoding.max_new_tokens
        if len(batch.items) > 1:
            self._sizer.too_large(len(batch.items), longest + new_tokens)
            self._queue.put_back(batch)
            return
        identity = self.model.identity
        failure = ModelError(
            f"model {identity.model_id!r} on {identity.device}: the memory does not hold one prompt of "
            f"{longest} positions with {new_tokens} new tokens; lower generation.max_new_tokens, use a "
            f"{_HELPS_MEMORY}"
        )
        failure.__cause__ = error
        batch.items[0].request.fail(failure)

    def _forward(self, job: ForwardJob) -> None:
        if job.request.dropped:
            return
        started = time.perf_counter()
        try:
            job.request.deliver(job.run())
        except Exception as error:  # noqa: BLE001 -- the caller gets the error
            job.request.fail(error)
        self._busy_seconds += time.perf_counter() - started


def _longest_first(prompt: Prompt) -> int:
    return -prompt.length
