"""Help for a row with many coalitions: idle workers answer some of them.

The worker that holds the row is its owner. It puts coalitions into a pool, idle workers take chunks of the
pool, and the answers go back to the owner. When a helper dies, its chunk is answered again. When an owner
dies, the answers that it has not fetched are lost.
"""

import secrets
from collections import deque
from collections.abc import Collection
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
class HelpOffer:
    """An owner's message to the exchange."""

    unit_id: str
    run_name: str
    masks: tuple[int, ...] = ()
    """Coalitions to put into the pool."""
    take_back: int = 0
    """Maximum number of coalitions that the owner wants back from the pool."""
    least: int = 1
    """Coalitions of a full batch. Chunks are multiples of it, except the last one."""
    most: int = 1
    """Coalitions of the largest chunk."""
    offer_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """Equal when a message is repeated for lack of a reply."""


@dataclass(frozen=True, slots=True)
class HelpReply:
    """The exchange's reply to an owner."""

    session: str = ""
    """Changes when the exchange has lost its data of the unit; empty for an unknown unit."""
    answers: dict[int, Answer] = field(default_factory=dict)
    """Answers of helpers since the last reply."""
    returned: tuple[int, ...] = ()
    """Coalitions that come back unanswered."""
    pooled: int = 0
    """The owner's coalitions that no helper has taken."""
    helpers: int = 0
    """Workers that help, or could help."""


@dataclass(slots=True)
class _Shared:
    """The exchange's data of one unit."""

    row_index: int
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    run_name: str = ""
    pool: deque[int] = field(default_factory=deque)
    least: int = 1
    most: int = 1
    answers: dict[int, Answer] = field(default_factory=dict)
    returned: list[int] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """Helpers that left coalitions unanswered; they get no more of this unit."""
    last: tuple[str, HelpReply] = ("", HelpReply())


class HelpExchange:
    """The pools of all units, the chunks that helpers hold, and the answers for the owners.

    Every call may be repeated: an offer that arrives twice gets the same reply.
    """

    def __init__(self) -> None:
        self._shared: dict[str, _Shared] = {}
        self._claimed: dict[int, tuple[str, HelpTask]] = {}
        # Not from 0: after a restart of the coordinator, helpers may still answer its earlier tasks.
        self._next_task = secrets.randbits(62)

    def exchange(self, offer: HelpOffer, row_index: int, workers: Collection[str]) -> HelpReply:
        """Take an owner's coalitions; return new answers and unanswered coalitions.

        `workers` are those besides the owner that help, or could help.
        """
        shared = self._shared.setdefault(offer.unit_id, _Shared(row_index))
        if shared.last[0] == offer.offer_id:
            return shared.last[1]
        shared.run_name, shared.least, shared.most = offer.run_name, offer.least, offer.most
        shared.pool.extend(offer.masks)
        back = [shared.pool.pop() for _ in range(min(offer.take_back, len(shared.pool)))]
        reply = HelpReply(
            session=shared.session,
            answers=shared.answers,
            returned=(*shared.returned, *back),
            pooled=len(shared.pool),
            helpers=len(set(workers) - shared.refused),
        )
        shared.answers, shared.returned = {}, []
        shared.last = (offer.offer_id, reply)
        return reply

    def claim(self, helper: str) -> HelpTask | None:
        """Return a chunk of the largest pool for `helper`; None if all pools are empty."""
        unit_id = max(
            (key for key, shared in self._shared.items() if shared.pool and helper not in shared.refused),
            key=lambda key: len(self._shared[key].pool),
            default=None,
        )
        if unit_id is None:
            return None
        shared = self._shared[unit_id]
        parties = len({who for who, task in self._claimed.values() if task.unit_id == unit_id} | {helper}) + 1
        size = chunk_size(len(shared.pool), parties, shared.least, shared.most)
        masks = tuple(shared.pool.popleft() for _ in range(size))
        self._next_task += 1
        task = HelpTask(self._next_task, unit_id, shared.row_index, shared.run_name, masks)
        self._claimed[task.task_id] = (helper, task)
        return task

    def deliver(self, task_id: int, answers: dict[int, Answer]) -> None:
        """Take a helper's answers. Coalitions without an answer go back to the owner."""
        helper, task = self._claimed.pop(task_id, (None, None))
        shared = None if task is None else self._shared.get(task.unit_id)
        if helper is None or task is None or shared is None:
            return
        shared.answers.update(answers)
        missing = [mask for mask in task.masks if mask not in answers]
        if missing:
            shared.returned.extend(missing)
            shared.refused.add(helper)

    def helper_lost(self, helper: str) -> None:
        """Put the chunks of a dead helper back into the pool."""
        for task_id, (owner, task) in list(self._claimed.items()):
            if owner == helper:
                del self._claimed[task_id]
                if task.unit_id in self._shared:
                    self._shared[task.unit_id].pool.extend(task.masks)

    def close(self, unit_id: str) -> None:
        """Forget a unit that is done or whose owner is dead."""
        self._shared.pop(unit_id, None)

    def is_helping(self, worker: str) -> bool:
        """Whether `worker` has a chunk."""
        return any(helper == worker for helper, _ in self._claimed.values())

    @property
    def helping(self) -> frozenset[str]:
        """Return the workers that have chunks."""
        return frozenset(helper for helper, _ in self._claimed.values())


def chunk_size(left: int, parties: int, least: int, most: int) -> int:
    """Return how many of `left` coalitions one of `parties` workers takes at a time.

    Guided self-scheduling: a worker holds two chunks, each half of its fair share. So chunks shrink towards
    the end, and all workers end together. At most `most`; whole batches of `least` except at the end.
    """
    batches = min(most, left // (4 * parties)) // least
    return min(left, max(1, batches) * least)
