"""Answering a row's coalitions: the worker's own engine, and idle workers beside it."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mllm_shap import ConversationSnapshot

from mllm_shapx.execution.sharing import Offer, OfferReply, chunk_size
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.models.base import Answer

OnAnswer = Callable[[int, Answer], None]
AnswerHere = Callable[[Mapping[int, ConversationSnapshot], OnAnswer], Awaitable[None]]
"""Answers coalitions with the worker's own engine."""

Exchange = Callable[[Offer], Awaitable[OfferReply]]

ROUNDS_IN_HAND = 2
"""Rounds given to the engine at a time, so that it never waits for the next."""
BATCHES_A_ROUND = 2
"""Batches of the largest round: enough to order them, few enough to leave the rest to others."""
EXCHANGE_S = 0.2
"""Seconds between two exchanges while others help."""
LAST_EXCHANGE_S = 0.05
"""The same while only helpers' answers are missing."""
LOOK_S = 1.0
"""Seconds between two looks for helpers while there are none."""
PATIENCE_S = 30.0
"""Seconds without an answer after which the owner answers itself what helpers have not."""
PATIENCE_ROUNDS = 5.0
"""The same in terms of the longest round that the owner's own engine took, whichever is longer."""


@dataclass(eq=False, slots=True)
class _Call:
    """One call of `answer` and what it waits for."""

    prompts: Mapping[int, ConversationSnapshot]
    keep: Keep
    unanswered: int
    done: "asyncio.Future[None]"


class RowGeneration:
    """Answers the coalitions that one run asks of one row; a context manager.

    What others could help with lies in the exchange's pool: the owner keeps a fair share and takes the rest
    back as it gets on. Coalitions are taken by their prompts' lengths, the longest first, so that batches
    are even.

    Args:
        unit_id: The unit that the row belongs to.
        run_name: The run that asks.
        here: The worker's own engine.
        exchange: The coordinator's exchange.
        batch_size: Tells how many prompts make a batch at present.
    """

    def __init__(
        self,
        unit_id: str,
        run_name: str,
        here: AnswerHere,
        exchange: Exchange,
        batch_size: Callable[[], int],
    ) -> None:
        self._unit_id = unit_id
        self._run_name = run_name
        self._here = here
        self._exchange = exchange
        self._batch_size = batch_size
        self._calls: dict[int, _Call] = {}
        self._lengths: dict[int, int] = {}
        self._waiting: list[int] = []
        self._outstanding: set[int] = set()
        self._session = ""
        self._pooled = 0
        self._helpers = 0
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._more = asyncio.Event()
        self._hungry = asyncio.Event()
        self._trading = asyncio.Lock()
        self._heard = time.monotonic()
        self._longest_round = 0.0

    async def __aenter__(self) -> Self:
        """Do nothing yet: a run whose answers are all stored needs no engine."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; leave nothing in the pool."""
        # Not in the middle of an exchange: what it brings back would be lost.
        async with self._trading:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._outstanding:
            await self._exchange(Offer(self._unit_id, self._run_name, take_back=len(self._outstanding)))

    async def answer(self, prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
        """Answer `prompts` (mask -> prompt); `keep` gets each answer once, as it comes.

        Calls may run side by side; none asks for what another one is waiting for.

        Raises:
            Exception: Whatever the worker's own engine raised.
        """
        if self._failure is not None:
            raise self._failure
        if not prompts:
            return
        call = _Call(prompts, keep, len(prompts), asyncio.get_running_loop().create_future())
        self._calls.update(dict.fromkeys(prompts, call))
        self._lengths.update((mask, _length(prompt)) for mask, prompt in prompts.items())
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
            jobs = [self._work() for _ in range(ROUNDS_IN_HAND)] + [self._spread()]
            self._tasks = [asyncio.create_task(self._guard(job)) for job in jobs]

    async def _guard(self, job: Awaitable[None]) -> None:
        """Hand an error to whoever waits for answers."""
        try:
            await job
        except Exception as error:  # noqa: BLE001 -- the caller's, who gets it as it is
            self._failure = error
            for call in set(self._calls.values()):
                if not call.done.done():
                    call.done.set_exception(error)

    async def _work(self) -> None:
        """Answer one round after the other."""
        while True:
            prompts = self._next_round()
            if prompts:
                started = time.monotonic()
                await self._here(prompts, self._take)
                self._longest_round = max(self._longest_round, time.monotonic() - started)
            else:
                self._hungry.set()
                self._more.clear()
                await self._more.wait()

    def _next_round(self) -> dict[int, ConversationSnapshot]:
        """Take the next coalitions, fewer towards the end when others help."""
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
        """Put coalitions among those that wait; the longest prompts come last, to be taken first."""
        self._waiting = sorted((*self._waiting, *masks), key=self._lengths.__getitem__)
        self._more.set()

    def _take(self, mask: int, answer: Answer) -> None:
        """Hand an answer on, unless somebody else's came before it."""
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

    async def _spread(self) -> None:
        """Trade with the exchange while there is something to give or to get."""
        await asyncio.sleep(0)  # the engine first
        while True:
            if self._outstanding or len(self._waiting) > self._batch:
                await self._trade()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hungry.wait(), self._pause)
            self._hungry.clear()

    @property
    def _pause(self) -> float:
        if not self._helpers and not self._outstanding:
            return LOOK_S
        return EXCHANGE_S if self._waiting or self._pooled else LAST_EXCHANGE_S

    async def _trade(self) -> None:
        """Exchange once, or twice when helpers are found that there were none of before."""
        async with self._trading:
            alone = not self._helpers
            await self._trade_once()
            if alone and self._helpers:
                await self._trade_once()

    async def _trade_once(self) -> None:
        """Bring what lies here to the owner's fair share of all that nobody has begun."""
        batch, share = self._batch, self._share
        given: list[int] = []
        if self._helpers and len(self._waiting) - share >= batch:
            # From the other end: helpers get the short prompts.
            cut = len(self._waiting) - share
            given, self._waiting = self._waiting[:cut], self._waiting[cut:]
            given.reverse()
        take_back = max(0, share - len(self._waiting)) if self._pooled else 0
        self._outstanding.update(given)
        offer = Offer(self._unit_id, self._run_name, tuple(given), take_back, batch, BATCHES_A_ROUND * batch)
        self._take_in(await self._exchange(offer), given)

    @property
    def _share(self) -> int:
        """Return how many of the coalitions that nobody has begun should lie here: whole batches."""
        left = len(self._waiting) + self._pooled
        return -(-left // ((self._helpers + 1) * self._batch)) * self._batch

    def _take_in(self, reply: OfferReply, given: Collection[int]) -> None:
        for mask, answer in reply.answers.items():
            self._take(mask, answer)
        returned = set(reply.returned)
        if reply.session != self._session:
            # The exchange knows nothing of what it was given before: the coordinator was restarted.
            returned |= self._outstanding.difference(given if reply.session else ())
            self._session = reply.session
        self._pooled, self._helpers = reply.pooled, reply.helpers
        if reply.answers or self._waiting or reply.pooled:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > max(PATIENCE_S, PATIENCE_ROUNDS * self._longest_round):
            returned |= self._outstanding
        self._outstanding -= returned
        back = [mask for mask in returned if mask in self._calls]
        if back:
            self._queue(back)


def _length(snapshot: ConversationSnapshot) -> int:
    return sum(len(message.text) for message in snapshot.messages())
