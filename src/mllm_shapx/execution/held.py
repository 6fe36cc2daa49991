"""A unit that a worker is explaining, and its unwritten answers."""

import asyncio
import time

from mllm_shapx.execution.messages import Answers
from mllm_shapx.explaining.similarity import Vector
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.planning.units import WorkUnit


class HeldUnit:
    """A unit that the worker is explaining."""

    def __init__(self, unit: WorkUnit) -> None:
        self.unit = unit
        self.explainer: RowExplainer | None = None
        self.vectors: dict[str, dict[bytes, Vector]] = {}
        self.flushed_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None

    @property
    def answers(self) -> int:
        """Return the number of answers and likelihoods of its row."""
        if self.explainer is None:
            return 0
        row = self.explainer.coalitions
        return len(row.stored) + len(row.likelihoods.stored)

    def take_new(self) -> Answers:
        """Return the answers, vectors and likelihoods since the last call."""
        if self.explainer is None:
            return Answers()
        coalitions = self.explainer.coalitions
        vectors, self.vectors = self.vectors, {}
        return Answers(
            coalitions.take_fresh(),
            coalitions.snapshot.snapshot_id,
            self.explainer.num_players,
            vectors,
            coalitions.likelihoods.take_fresh(),
        )
