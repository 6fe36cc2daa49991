"""The answers to a row's coalitions, and likelihoods after their prompts: computed once for all runs."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import batched

from mllm_shap import CoalitionMask, ConversationSnapshot, DeletePolicy, PlayerSet
from mllm_shap.protocols.masking import AbsencePolicy

from mllm_shapx.errors import first_of
from mllm_shapx.models.base import Answer
from mllm_shapx.records.likelihood import Likelihood, LikelihoodKey

Keep = Callable[[int, Answer], None]
"""Receives each new answer: `(mask, answer)`."""

Generate = Callable[[Mapping[int, ConversationSnapshot], Keep], Awaitable[None]]
"""Generates the answers to coalitions (mask -> prompt) and passes each to `Keep`. Calls may overlap."""

_Prompts = dict[int, ConversationSnapshot]

_SLICE = 1 << 10
"""Prompts rendered at a time, while earlier ones are being answered."""
_SLICES_IN_HAND = 1 << 5
"""Most slices in memory at a time."""

REUSED = ""
"""`Answer.asked_by` of an answer that was copied from a coalition with the same prompt."""


class RowLikelihoods:
    """All likelihoods of one row under one generation key."""

    def __init__(self) -> None:
        self.stored: dict[LikelihoodKey, Likelihood] = {}
        self._fresh: dict[LikelihoodKey, Likelihood] = {}

    def know(self, stored: Mapping[LikelihoodKey, Likelihood]) -> None:
        """Add stored likelihoods, so that they are not read again."""
        self.stored.update(stored)

    def knows(self, key: LikelihoodKey, top_k: int) -> bool:
        """Return whether a likelihood with at least the `top_k` most probable tokens is known."""
        found = self.stored.get(key)
        return found is not None and found.top_k >= top_k

    def keep(self, key: LikelihoodKey, likelihood: Likelihood) -> None:
        """Add a new likelihood."""
        self.stored[key] = self._fresh[key] = likelihood

    def read_for(self, run_name: str, masks: Iterable[int]) -> int:
        """Return how many likelihoods after the prompts of `masks` were read for a run."""
        wanted = set(masks)
        return sum(each.asked_by == run_name and mask in wanted for (_, mask), each in self.stored.items())

    def take_fresh(self) -> dict[LikelihoodKey, Likelihood]:
        """Return the new likelihoods since the last call, for the store."""
        fresh, self._fresh = self._fresh, {}
        return fresh


class RowCoalitions:
    """All answers of one row under one generation key.

    A coalition is an integer: bit i is set when player i is present. Runs call `answers`; a missing answer is
    generated once, for the first run that needs it.
    """

    def __init__(
        self,
        snapshot: ConversationSnapshot,
        players: PlayerSet,
        *,
        share_prompts: bool,
        policy: AbsencePolicy | None = None,
    ) -> None:
        """Set up the row.

        Args:
            snapshot: The whole conversation.
            players: Its players.
            share_prompts: Whether coalitions with equal prompts share one answer: right for greedy decoding,
                wrong for sampling.
            policy: Renders absent players; None leaves them out.
        """
        self.snapshot = snapshot
        self.players = players
        self.stored: dict[int, Answer] = {}
        self.likelihoods = RowLikelihoods()
        self._policy = DeletePolicy() if policy is None else policy
        self._fresh: dict[int, Answer] = {}
        self._mask_of_prompt: dict[str, int] | None = {} if share_prompts else None

    def know(self, stored: Mapping[int, Answer]) -> None:
        """Add stored answers, so that they are not generated again."""
        self.stored.update(stored)
        if self._mask_of_prompt is not None:
            for mask in stored:
                self._mask_of_prompt.setdefault(self.render(mask).snapshot_id, mask)

    def render(self, mask: int) -> ConversationSnapshot:
        """Return the conversation without the players outside `mask`."""
        present = tuple(bool(mask >> index & 1) for index in range(self.players.num_players))
        return self._policy.apply(self.snapshot, self.players, CoalitionMask(present))

    def missing(self, masks: Sequence[int]) -> list[int]:
        """Return the coalitions of `masks` without an answer, each once, in order."""
        return [mask for mask in dict.fromkeys(masks) if mask not in self.stored]

    async def answers(self, masks: Sequence[int], run_name: str, generate: Generate) -> list[Answer]:
        """Return the answers to `masks`; missing ones are generated for `run_name`."""
        await self._generate(self.missing(masks), run_name, generate)
        return [self.stored[mask] for mask in masks]

    def model_calls(self, masks: Sequence[int], run_name: str) -> int:
        """Return how many of the answers to `masks` were generated for `run_name`."""
        return sum(self.stored[mask].asked_by == run_name for mask in set(masks))

    def tokens(self, masks: Sequence[int], run_name: str) -> tuple[int | None, int | None]:
        """Return the tokens of prompts and of answers for `run_name`; None if no server counted them."""
        asked = (self.stored[mask] for mask in set(masks) if mask in self.stored)
        mine = [answer for answer in asked if answer.asked_by == run_name]
        return _sum(answer.tokens_in for answer in mine), _sum(answer.tokens_out for answer in mine)

    def distinct_answers(self, masks: Sequence[int]) -> int:
        """Return the number of distinct answers (text and audio) to `masks`."""
        answers = (self.stored[mask] for mask in masks)
        return len({(answer.text, answer.audio_frames) for answer in answers})

    def take_fresh(self) -> dict[int, Answer]:
        """Return the new answers since the last call, for the store."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    async def _generate(self, masks: Sequence[int], run_name: str, generate: Generate) -> None:
        """Generate the answers to `masks`; coalitions with equal prompts are asked once."""
        twin_of: dict[int, int] = {}

        async def ask(_part: Sequence[int], rendered: tuple[_Prompts, dict[int, int]]) -> None:
            prompts, twins = rendered
            twin_of.update(twins)
            await generate(prompts, lambda mask, answer: self._keep(mask, replace(answer, asked_by=run_name)))

        await in_slices(masks, self._prompts, ask, _SLICES_IN_HAND)
        for mask, first in twin_of.items():
            self._keep(mask, replace(self.stored[first], asked_by=REUSED))

    def _prompts(self, masks: Sequence[int]) -> tuple[_Prompts, dict[int, int]]:
        """Return the prompts to ask, and for each other coalition the coalition with the same prompt."""
        prompts: dict[int, ConversationSnapshot] = {}
        twin_of: dict[int, int] = {}
        for mask in masks:
            prompt = self.render(mask)
            first = mask
            if self._mask_of_prompt is not None:
                first = self._mask_of_prompt.setdefault(prompt.snapshot_id, mask)
            if first == mask:
                prompts[mask] = prompt
            else:
                twin_of[mask] = first
        return prompts, twin_of

    def _keep(self, mask: int, answer: Answer) -> None:
        self.stored[mask] = self._fresh[mask] = answer


async def in_slices[Item, Rendered](
    items: Sequence[Item],
    render: Callable[[Sequence[Item]], Rendered],
    ask: Callable[[Sequence[Item], Rendered], Awaitable[None]],
    in_hand: int,
) -> None:
    """Render one slice of `items` after the other in a thread, while earlier slices are asked.

    At most `in_hand` slices are in memory at a time.
    """
    room = asyncio.Semaphore(in_hand)

    async def ask_slice(part: Sequence[Item], rendered: Rendered) -> None:
        await ask(part, rendered)
        room.release()

    try:
        async with asyncio.TaskGroup() as group:
            for part in batched(items, _SLICE):
                await room.acquire()
                group.create_task(ask_slice(part, await asyncio.to_thread(render, part)))
    except ExceptionGroup as failures:
        # The first error is the cause; the others repeat it or follow from it.
        raise first_of(failures) from None


def _sum(counts: Iterable[int | None]) -> int | None:
    """Return the sum of the known counts; None when none is known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
