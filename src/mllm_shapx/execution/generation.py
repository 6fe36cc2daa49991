"""Answering a row's coalitions: the worker's own engine, and idle workers beside it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from mllm_shap import ConversationSnapshot

from mllm_shapx.execution.sharing import Offer, OfferReply, cut
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.models.base import Answer

OnAnswer = Callable[[int, Answer], None]
AnswerHere = Callable[[Sequence[int], OnAnswer], Awaitable[None]]
"""Answers coalitions with the worker's own engine."""

Exchange = Callable[[Offer], Awaitable[OfferReply]]

ROUNDS_IN_HAND = 2
"""Rounds given to the engine at a time, so that it never waits for the next."""
EXCHANGE_S = 0.2
"""Seconds between two exchanges with helpers."""
LOOK_S = 1.0
"""Seconds between two looks for helpers while there are none."""


class RowGeneration:
    """Answers the coalitions of one call, giving some away to workers that have nothing to do.

    Coalitions are taken in the order of their prompts' lengths, the longest first, so that batches are even;
    helpers get theirs from the other end. The calls of one unit come one after the other.
    """

    def __init__(
        self,
        prompts: Mapping[int, ConversationSnapshot],
        keep: Keep,
        here: AnswerHere,
        exchange: Exchange,
        offer: Offer,
    ) -> None:
        self._waiting = sorted(prompts, key=lambda mask: -_length(prompts[mask]))
        self._unanswered = set(prompts)
        self._keep = keep
        self._here = here
        self._exchange = exchange
        self._offer = offer
        self._outstanding: set[int] = set()
        self._idle = 0
        self._trading = asyncio.Lock()

    async def run(self, round_size: Callable[[], int]) -> None:
        """Answer everything; `round_size()` is how many coalitions make the engine a good round."""
        spreading = asyncio.create_task(self._spread(round_size))
        try:
            while self._unanswered:
                await _together([self._work(round_size) for _ in range(ROUNDS_IN_HAND)])
                if self._unanswered:
                    await self._take_back(round_size)
        finally:
            # Not in the middle of an exchange: answers that are on their way would be lost.
            async with self._trading:
                spreading.cancel()
            await asyncio.gather(spreading, return_exceptions=True)

    async def _work(self, round_size: Callable[[], int]) -> None:
        while self._waiting:
            size = max(1, round_size())
            masks, self._waiting = self._waiting[:size], self._waiting[size:]
            await self._here(masks, self._take)

    async def _spread(self, round_size: Callable[[], int]) -> None:
        """Offer chunks while workers are idle."""
        while True:
            await asyncio.sleep(EXCHANGE_S if self._outstanding or self._idle else LOOK_S)
            if self._outstanding or len(self._waiting) > ROUNDS_IN_HAND * round_size():
                await self._trade(round_size())

    async def _trade(self, round_size: int, *, reclaim: bool = False) -> None:
        """Exchange once: hand over chunks for idle workers, take in what they answered."""
        async with self._trading:
            await self._trade_alone(round_size, reclaim=reclaim)

    async def _trade_alone(self, round_size: int, *, reclaim: bool) -> None:
        chunks: list[tuple[int, ...]] = []
        if self._idle and not reclaim:
            share = len(self._waiting) // (2 * (self._idle + 1))
            chunks = cut(self._waiting, self._idle, max(round_size, share))
            if sum(map(len, chunks)) + round_size > len(self._waiting):
                chunks = []
        given = [mask for chunk in chunks for mask in chunk]
        self._waiting = self._waiting[: len(self._waiting) - len(given)]
        self._outstanding.update(given)
        reply = await self._exchange(
            Offer(self._offer.unit_id, self._offer.run_name, tuple(chunks), reclaim=reclaim)
        )
        for mask, answer in reply.answers.items():
            self._take(mask, answer)
        returned = [mask for mask in reply.returned if mask in self._outstanding]
        if reply.outstanding < len(self._outstanding) - len(returned):
            # The coordinator was restarted and knows nothing of them.
            returned = list(self._outstanding)
        self._outstanding.difference_update(returned)
        self._waiting.extend(mask for mask in returned if mask in self._unanswered)
        self._idle = max(0, reply.idle_workers - reply.queued_chunks)

    async def _take_back(self, round_size: Callable[[], int]) -> None:
        """Take back what no helper has begun; with nothing to do, wait a little for the rest."""
        await self._trade(round_size(), reclaim=True)
        if not self._waiting and self._unanswered:
            await asyncio.sleep(EXCHANGE_S / 4)

    def _take(self, mask: int, answer: Answer) -> None:
        self._outstanding.discard(mask)
        if mask in self._unanswered:
            self._unanswered.discard(mask)
            self._keep(mask, answer)


def _length(snapshot: ConversationSnapshot) -> int:
    return sum(len(message.text) for message in snapshot.messages())


async def _together(jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run jobs side by side; the first error ends the others and is raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
