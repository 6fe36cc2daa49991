"""Answers the coalitions of a row with the worker's own engine, and with idle workers that help."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mllm_shap import ConversationSnapshot

from mllm_shapx.execution.helping import HelpOffer, HelpReply, chunk_size
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.models.base import Answer

OnAnswer = Callable[[int, Answer], None]
AnswerHere = Callable[[Mapping[int, ConversationSnapshot], OnAnswer], Awaitable[None]]
"""Answers coalitions with the worker's own engine."""

Exchange = Callable[[HelpOffer], Awaitable[HelpReply]]

ROUNDS_IN_HAND = 2
"""Rounds that the engine has at a time, so that it never waits for the next one."""
BATCHES_A_ROUND = 2
"""Batches of the largest round: enough to sort, few enough to leave work for helpers."""
EXCHANGE_S = 0.2
"""Seconds between two exchanges while other workers help."""
LAST_EXCHANGE_S = 0.05
"""The same while only helpers' answers are missing."""
LOOK_S = 1.0
"""Seconds between two checks for helpers while there are none."""
PATIENCE_S = 30.0
"""Seconds without an answer after which the owner answers the coalitions of its helpers itself."""
PATIENCE_ROUNDS = 5.0
"""The same as a multiple of the owner's longest round; the larger of both counts."""


@dataclass(eq=False, slots=True)
class _Call:
    """One call of `answer`, and its open coalitions."""

    prompts: Mapping[int, ConversationSnapshot]
    keep: Keep
    unanswered: int
    done: "asyncio.Future[None]"


class RowAnswerer:
    """Answers one run's coalitions of one row; a context manager.

    The exchange's pool has coalitions that other workers could answer. The owner keeps a fair share and
    takes more back as it proceeds. Prompts are taken in the engine's order.

    Args:
        unit_id: The row's unit.
        run_name: The run.
        here: Answers with the worker's own engine.
        exchange: The coordinator's exchange.
        batch_size: Returns the current batch size in prompts.
        order: Returns the sort key of a prompt (see `PromptEngine.order`).
    """

    def __init__(
        self,
        unit_id: str,
        run_name: str,
        here: AnswerHere,
        exchange: Exchange,
        batch_size: Callable[[], int],
        *,
        order: Callable[[ConversationSnapshot], Any],
    ) -> None:
        self._unit_id = unit_id
        self._run_name = run_name
        self._here = here
        self._exchange = exchange
        self._batch_size = batch_size
        self._order = order
        self._calls: dict[int, _Call] = {}
        self._order_keys: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._outstanding: set[int] = set()
        self._session = ""
        self._pooled = 0
        self._helpers = 0
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._more = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._exchanging = asyncio.Lock()
        self._heard_at = time.monotonic()
        self._longest_round = 0.0

    async def __aenter__(self) -> Self:
        """Start nothing yet: a run with all answers stored needs no engine."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; remove all coalitions from the pool."""
        # Not during an exchange: its answers would be lost.
        async with self._exchanging:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._outstanding:
            await self._exchange(HelpOffer(self._unit_id, self._run_name, take_back=len(self._outstanding)))

    async def answer(self, prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
        """Answer `prompts` (mask -> prompt); `keep` gets each answer once, as it arrives.

        Calls may overlap, for different coalitions.

        Raises:
            Exception: Any error of the worker's own engine.
        """
        if self._failure is not None:
            raise self._failure
        if not prompts:
            return
        call = _Call(prompts, keep, len(prompts), asyncio.get_running_loop().create_future())
        self._calls.update(dict.fromkeys(prompts, call))
        self._order_keys.update((mask, self._order(prompt)) for mask, prompt in prompts.items())
        self._queue(prompts)
        self._start()
        try:
            await call.done
        finally:
            for mask in prompts:
                self._calls.pop(mask, None)

    # --- the worker's own engine

    def _start(self) -> None:
        if not self._tasks:
            jobs = [self._work() for _ in range(ROUNDS_IN_HAND)] + [self._get_help()]
            self._tasks = [asyncio.create_task(self._guard(job)) for job in jobs]

    async def _guard(self, job: Awaitable[None]) -> None:
        """Pass an error to the waiting calls."""
        try:
            await job
        except Exception as error:  # noqa: BLE001 -- the caller gets it unchanged
            self._failure = error
            for call in set(self._calls.values()):
                if not call.done.done():
                    call.done.set_exception(error)

    async def _work(self) -> None:
        """Answer round after round."""
        while True:
            prompts = self._next_round()
            if prompts:
                started = time.monotonic()
                await self._here(prompts, self._take)
                self._longest_round = max(self._longest_round, time.monotonic() - started)
            else:
                self._is_idle.set()
                self._more.clear()
                await self._more.wait()

    def _next_round(self) -> dict[int, ConversationSnapshot]:
        """Take the next coalitions; fewer towards the end, if others help."""
        size = self._largest_round
        if self._helpers:
            left = len(self._waiting) + self._pooled
            size = chunk_size(left, self._helpers + 1, self._batch, self._largest_round)
        taken: dict[int, ConversationSnapshot] = {}
        while self._waiting and len(taken) < size:
            mask = self._waiting.pop()
            if (call := self._calls.get(mask)) is not None:
                taken[mask] = call.prompts[mask]
        return taken

    def _queue(self, masks: Iterable[int]) -> None:
        """Add coalitions to the waiting ones, which are taken from the end of the list."""
        self._waiting = sorted((*self._waiting, *masks), key=self._order_keys.__getitem__, reverse=True)
        self._more.set()

    def _take(self, mask: int, answer: Answer) -> None:
        """Pass an answer to its call, unless the coalition already has one."""
        self._outstanding.discard(mask)
        call = self._calls.pop(mask, None)
        if call is None:
            return
        call.keep(mask, answer)
        call.unanswered -= 1
        if not call.unanswered and not call.done.done():
            call.done.set_result(None)

    @property
    def _batch(self) -> int:
        return max(1, self._batch_size())

    @property
    def _largest_round(self) -> int:
        return BATCHES_A_ROUND * self._batch

    # --- helpers

    async def _get_help(self) -> None:
        """Exchange with helpers while there are coalitions to offer or answers to receive."""
        await asyncio.sleep(0)  # the engine first
        while True:
            if self._outstanding or len(self._waiting) > self._batch:
                await self._exchange_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_idle.wait(), self._pause)
            self._is_idle.clear()

    @property
    def _pause(self) -> float:
        if not self._helpers and not self._outstanding:
            return LOOK_S
        return EXCHANGE_S if self._waiting or self._pooled else LAST_EXCHANGE_S

    async def _exchange_all(self) -> None:
        """Exchange once; twice after finding the first helpers."""
        async with self._exchanging:
            alone = not self._helpers
            await self._exchange_once()
            if alone and self._helpers:
                await self._exchange_once()

    async def _exchange_once(self) -> None:
        """Keep the owner's fair share of the unstarted coalitions; offer the rest."""
        batch, share = self._batch, self._share
        given: list[int] = []
        if self._helpers and len(self._waiting) - share >= batch:
            # Helpers get what comes last in the order.
            cut = len(self._waiting) - share
            given, self._waiting = self._waiting[:cut], self._waiting[cut:]
            given.reverse()
        take_back = max(0, share - len(self._waiting)) if self._pooled else 0
        self._outstanding.update(given)
        offer = HelpOffer(
            self._unit_id, self._run_name, tuple(given), take_back, batch, BATCHES_A_ROUND * batch
        )
        self._take_reply(await self._exchange(offer), given)

    @property
    def _share(self) -> int:
        """Return the owner's fair share of the unstarted coalitions, in whole batches."""
        left = len(self._waiting) + self._pooled
        return -(-left // ((self._helpers + 1) * self._batch)) * self._batch

    def _take_reply(self, reply: HelpReply, given: Collection[int]) -> None:
        for mask, answer in reply.answers.items():
            self._take(mask, answer)
        returned = set(reply.returned)
        if reply.session != self._session:
            # The coordinator restarted, and the exchange lost its coalitions.
            returned |= self._outstanding.difference(given if reply.session else ())
            self._session = reply.session
        self._pooled, self._helpers = reply.pooled, reply.helpers
        if reply.answers or self._waiting or reply.pooled:
            self._heard_at = time.monotonic()
        elif time.monotonic() - self._heard_at > max(PATIENCE_S, PATIENCE_ROUNDS * self._longest_round):
            returned |= self._outstanding
        self._outstanding -= returned
        back = [mask for mask in returned if mask in self._calls]
        if back:
            self._queue(back)
