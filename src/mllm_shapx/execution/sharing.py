"""Spreading a heavy row over idle workers: chunks of its coalitions, and who has which. No ray.

The worker that holds the row stays its owner. It offers chunks, idle workers claim them, and the answers go
back to the owner. A helper that dies costs its chunk only; an owner that dies costs what it has not fetched.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm_shapx.models.base import Answer


@dataclass(frozen=True, slots=True)
class HelpTask:
    """Coalitions of another worker's row to be answered."""

    task_id: int
    unit_id: str
    row_index: int
    run_name: str
    masks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """What an owner says to the exchange."""

    unit_id: str
    run_name: str
    chunks: tuple[tuple[int, ...], ...] = ()
    """Coalitions to give away, one chunk per helper at a time."""
    reclaim: bool = False
    """Whether the owner has nothing else to do and takes back what nobody has claimed."""


@dataclass(frozen=True, slots=True)
class OfferReply:
    """What the exchange says to an owner."""

    answers: dict[int, Answer]
    """Answers that helpers have given since the last time."""
    returned: tuple[int, ...]
    """Coalitions that come back unanswered."""
    outstanding: int
    """Coalitions of the owner that are queued or with helpers."""
    queued_chunks: int
    """Chunks of the owner that nobody has claimed."""
    idle_workers: int
    """Workers that could help."""


@dataclass(slots=True)
class _Shared:
    """All that is given away of one unit."""

    row_index: int
    queue: deque[tuple[str, tuple[int, ...]]] = field(default_factory=deque)
    answers: dict[int, Answer] = field(default_factory=dict)
    returned: list[int] = field(default_factory=list)


class HelpExchange:
    """Chunks on offer, chunks with helpers, and answers waiting for their owner."""

    def __init__(self) -> None:
        self._shared: dict[str, _Shared] = {}
        self._claimed: dict[int, tuple[str, HelpTask]] = {}
        self._next_task = 0

    def exchange(self, offer: Offer, row_index: int, idle_workers: int) -> OfferReply:
        """Take an owner's chunks and give it what has come back."""
        shared = self._shared.setdefault(offer.unit_id, _Shared(row_index))
        shared.queue.extend((offer.run_name, chunk) for chunk in offer.chunks)
        if offer.reclaim:
            shared.returned.extend(mask for _, chunk in shared.queue for mask in chunk)
            shared.queue.clear()
        answers, shared.answers = shared.answers, {}
        returned, shared.returned = tuple(shared.returned), []
        with_helpers = sum(
            len(task.masks) for _, task in self._claimed.values() if task.unit_id == offer.unit_id
        )
        queued = sum(len(chunk) for _, chunk in shared.queue)
        return OfferReply(answers, returned, with_helpers + queued, len(shared.queue), idle_workers)

    def claim(self, helper: str) -> HelpTask | None:
        """Give `helper` a chunk, from the unit that has most on offer."""
        unit_id = max(self._shared, key=lambda key: len(self._shared[key].queue), default=None)
        if unit_id is None or not self._shared[unit_id].queue:
            return None
        shared = self._shared[unit_id]
        run_name, masks = shared.queue.popleft()
        self._next_task += 1
        task = HelpTask(self._next_task, unit_id, shared.row_index, run_name, masks)
        self._claimed[task.task_id] = (helper, task)
        return task

    def deliver(self, task_id: int, answers: dict[int, Answer]) -> None:
        """Take a helper's answers; coalitions that it leaves out go back to the owner."""
        claimed = self._claimed.pop(task_id, None)
        if claimed is None:
            return
        task = claimed[1]
        shared = self._shared.get(task.unit_id)
        if shared is None:
            return
        shared.answers.update(answers)
        shared.returned.extend(mask for mask in task.masks if mask not in answers)

    def helper_lost(self, helper: str) -> None:
        """Put the chunks of a dead helper on offer again."""
        for task_id, (owner, task) in list(self._claimed.items()):
            if owner == helper:
                del self._claimed[task_id]
                if task.unit_id in self._shared:
                    self._shared[task.unit_id].queue.appendleft((task.run_name, task.masks))

    def close(self, unit_id: str) -> None:
        """Forget a unit that is done, or whose owner is gone."""
        self._shared.pop(unit_id, None)

    def is_helping(self, worker: str) -> bool:
        """Whether `worker` has a chunk."""
        return any(helper == worker for helper, _ in self._claimed.values())


def cut(masks: Sequence[int], chunks: int, size: int) -> list[tuple[int, ...]]:
    """Cut the end of `masks` into at most `chunks` chunks of `size`, the last ones first."""
    found = []
    end = len(masks)
    for _ in range(chunks):
        if end <= 0:
            break
        start = max(0, end - size)
        found.append(tuple(masks[start:end]))
        end = start
    return found
