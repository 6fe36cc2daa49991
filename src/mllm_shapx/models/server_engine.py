"""The engine of a model behind a server: many awaiting prompts become many requests in flight."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from mllm_shap import ConversationSnapshot
from numpy.typing import NDArray

from mllm_shapx.errors import ModelChangedError, ModelError, RowError, ServerError, StudyError, first_of
from mllm_shapx.models.base import Answer, Decoding, EmbeddingMode, EngineStats
from mllm_shapx.models.server_client import Reply, ServerClient, Setback
from mllm_shapx.models.server_identity import ServedModel, look
from mllm_shapx.models.server_text import ServerModel, ServerPrompt
from mllm_shapx.models.server_throttle import Throttle

PATIENCE_S = 600.0
"""Seconds without an answer that a study waits for its server."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
"""Pauses double from setback to setback, and are drawn between the half and the whole."""
TRIES = 6
"""Times that one prompt may fail while others are answered."""
QUIET_S = 3.0
"""Seconds of setbacks before they are told of."""


@dataclass(slots=True)
class _Trouble:
    """What one prompt has met with."""

    failures: int = 0
    answered_before: int = 0
    """Answers to other prompts when it first failed."""


class ServerEngine:
    """Answers prompts of many concurrent callers through one server. For one event loop.

    Requests go out in the order of the prompts' texts, so that the server's prefix cache works, and as many
    at a time as the server takes (`Throttle`). A setback is waited out, for at most `patience_s` without any
    answer; no prompt is to blame for it, unless it fails again and again while others are answered.

    Args:
        model: The model behind the server; the engine owns it and closes it.
        patience_s: Seconds without an answer after which the study stops.
    """

    def __init__(self, model: ServerModel, *, patience_s: float = PATIENCE_S) -> None:
        self.model = model
        self._patience_s = patience_s
        self._client = ServerClient(model.service)
        self._throttle = Throttle(model.service.max_concurrency)
        self._looking = asyncio.Lock()
        self._served: ServedModel | None = None
        self._is_sure = False
        """Whether the server has the study's model for all that is known."""
        self._broken: StudyError | None = None
        self._answered = 0
        self._setbacks = 0
        self._silent_since: float | None = None
        self._last = ""

    @property
    def stats(self) -> EngineStats:
        """Return what has been done so far; the batch size is the number of requests in flight."""
        return EngineStats(
            prompts=self._answered,
            batches=self._answered,
            busy_seconds=self._throttle.busy_seconds,
            encode_seconds=0.0,
            padding_share=0.0,
            batch_size=self._throttle.limit,
            out_of_memory=0,
        )

    @property
    def waiting_for(self) -> str:
        """Return in words what is being waited for, empty while the server answers."""
        if self._silent_since is None or time.monotonic() - self._silent_since < QUIET_S:
            return ""
        return (
            f"the server at {self.model.service.base_url} gives no answers: {self._last}; waiting up to "
            f"{self._patience_s:g} s for it"
        )

    async def answer(
        self,
        snapshots: Sequence[ConversationSnapshot],
        decoding: Decoding,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer `snapshots`, in their order (see `Engine.answer`).

        Raises:
            RowError: When the server does not take one of the prompts.
            ServerError: When it has given no answer for too long, or takes no requests.
            ModelChangedError: When it has another model than the study began with.
        """
        if len(seeds) != len(snapshots):
            raise ValueError(f"{len(snapshots)} prompts need as many seeds, not {len(seeds)}")
        prompts = [self.model.encode(snapshot, decoding) for snapshot in snapshots]
        answers: dict[int, Answer] = {}

        async def ask(index: int) -> None:
            answers[index] = answer = await self._ask(prompts[index], decoding, seeds[index])
            if on_answer is not None:
                on_answer(index, answer)

        try:
            async with asyncio.TaskGroup() as group:
                for index in sorted(range(len(prompts)), key=lambda each: prompts[each].order):
                    group.create_task(ask(index))
        except ExceptionGroup as failures:
            raise first_of(failures) from None
        return [answers[index] for index in range(len(prompts))]

    async def embed(
        self, answers: Sequence[Answer], mode: EmbeddingMode, reducer: str
    ) -> list[NDArray[np.float64]]:
        """Raise `ModelError`: a server gives no states."""
        return self.model.embed(answers, mode, reducer)

    async def aclose(self) -> None:
        """Close the connections."""
        self._broken = ServerError("the engine is closed: it answers no more prompts")
        await self._client.aclose()

    async def _ask(self, prompt: ServerPrompt, decoding: Decoding, seed: int) -> Answer:
        trouble = _Trouble()
        while True:
            async with self._throttle.slot() as sent_at:
                if self._broken is not None:
                    raise self._broken
                try:
                    await self._make_sure()
                    reply = await self._client.ask(prompt.messages, decoding, seed)
                    return self._accept(reply)
                except Setback as setback:
                    pause_s = self._note(setback, sent_at, trouble)
                except StudyError as error:
                    self._break(error)
                    raise
            await asyncio.sleep(pause_s)

    def _break(self, error: StudyError) -> None:
        """Answer nothing more; the first reason counts."""
        self._broken = self._broken or error

    def _accept(self, reply: Reply) -> Answer:
        if self._broken is not None:
            raise self._broken
        served = self._served
        assert served is not None  # noqa: S101 -- for the type checker
        changed = [
            f"{name} was {old!r} and is {new!r}"
            for name, old, new in (
                ("model", served.model, reply.model),
                ("system_fingerprint", served.fingerprint, reply.fingerprint),
            )
            if old != new
        ]
        if changed:
            self._changed(", ".join(changed))
        self._answered += 1
        self._setbacks, self._silent_since = 0, None
        self._throttle.succeeded()
        self.model.count(reply)
        return reply.answer

    async def _make_sure(self) -> None:
        """Look at the server's model: at first, and whenever the server may have been started again."""
        if self._is_sure:
            return
        async with self._looking:
            if self._is_sure:
                return
            try:
                served = await look(self._client, self.model.settings)
            except ModelError as error:
                self._changed(str(error))
            before = self._served
            if served.commit != self.model.identity.revision:
                self._changed((before.difference(served) if before else None) or f"it has {served}")
            self._served, self._is_sure = served, True

    def _changed(self, how: str) -> NoReturn:
        raise ModelChangedError(
            f"the server at {self.model.service.base_url} is not what the study began with: {how}. No answer "
            "of it was kept since. Start the old model again and go on with --resume, or explain the new one "
            "under another experiment_set_id"
        )

    def _note(self, setback: Setback, sent_at: float, trouble: _Trouble) -> float:
        """Take note of a setback; return how long its prompt waits.

        Raises:
            ServerError: When there has been no answer for too long.
            RowError: When it is this prompt alone that fails.
        """
        now = time.monotonic()
        self._setbacks += 1
        self._last = setback.why
        if self._silent_since is None:
            self._silent_since = now
        self._give_up_if_silent(setback, now)
        if setback.is_away:
            # Who comes back may be another one.
            self._is_sure = False
            self._throttle.away()
        elif setback.is_busy:
            self._throttle.too_many(sent_at)
        if setback.is_away or setback.is_busy:
            self._throttle.pause(setback.wait_s or _pause_s(self._setbacks))
        if setback.is_away or setback.wait_s is not None:
            return 0.0
        if not trouble.failures:
            trouble.answered_before = self._answered
        trouble.failures += 1
        if trouble.failures >= TRIES and self._answered - trouble.answered_before >= TRIES:
            raise RowError(
                "server_failed",
                f"the server failed {trouble.failures} times at one of its prompts while it answered others: "
                f"{setback.why}",
            )
        return 0.0 if setback.is_busy else _pause_s(trouble.failures)

    def _give_up_if_silent(self, setback: Setback, now: float) -> None:
        silent = now - (self._silent_since or now)
        if max(silent, setback.wait_s or 0.0) <= self._patience_s:
            return
        self._broken = self._broken or ServerError(
            f"the server at {self.model.service.base_url} has given no answer for {silent:.0f} s: "
            f"{setback.why}"
            + (f", and asks to be left alone for {setback.wait_s:.0f} s" if setback.wait_s else "")
            + ". All answers so far are written and no row is to blame; go on with --resume when it is back. "
            "--server-patience says how long a study waits"
        )
        raise self._broken


def _pause_s(setbacks: int) -> float:
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(setbacks - 1, 10))
    return longest * random.uniform(0.5, 1.0)
