"""Our side: rows explained with the engine, as in a worker."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm_shap import ConversationSnapshot

from mllm_shapx.benchmark.subject import RowRun
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.unit import ModelAnswers, RowExplainer
from mllm_shapx.models.base import Model
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.flight import Flight
from mllm_shapx.records.results import SampleResult


@dataclass(frozen=True, slots=True)
class Turn:
    """Some complete games."""

    samples: Sequence[SampleResult]
    """One per game, in the order of the games."""
    prompts: Sequence[ConversationSnapshot]
    """The model's prompts."""
    seconds: float
    """Wall time."""
    busy_seconds: float
    """Part of `seconds` that the device spent in the model."""

    @property
    def coalitions(self) -> int:
        """Return the number of evaluated coalitions."""
        return sum(sample.n_calls for sample in self.samples)

    @property
    def rate(self) -> float:
        """Return coalitions per second."""
        return self.coalitions / self.seconds


class Explainer:
    """Plays games on one model, several rows at a time.

    Args:
        model: The loaded model.
        rows_in_flight: Rows at a time; None for as many as fill the batches, as in `run`.
        batch_size: Prompts of a batch; None for the model's own setting.
    """

    def __init__(self, model: Model, rows_in_flight: int | None, batch_size: int | None = None) -> None:
        self.engine = Engine(model, batch_size=batch_size)
        self.flight = Flight(rows_in_flight, lambda: self.engine.stats.batch_size)
        self._answers = ModelAnswers(self.engine, {})

    async def play(self, games: Sequence[RowRun]) -> Turn:
        """Explain the games' rows, without shared answers."""
        prompts: list[ConversationSnapshot] = []
        tasks: list[asyncio.Task[SampleResult]] = []
        self.flight.most = 0
        busy, started = self.engine.stats.busy_seconds, time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, game in enumerate(games):
                while not self.flight.has_room:
                    running = [task for task in tasks if not task.done()]
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                self.flight.begin(str(number), game.coalitions)
                tasks.append(group.create_task(self._explain(str(number), game, prompts)))
        seconds = time.perf_counter() - started
        samples = [task.result() for task in tasks]
        return Turn(samples, prompts, seconds, self.engine.stats.busy_seconds - busy)

    async def _explain(self, number: str, game: RowRun, prompts: list[ConversationSnapshot]) -> SampleResult:
        async def generate(asked: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
            prompts.extend(asked.values())
            await self._answers.answer(game.run, game.row.row_index, asked, keep)

        try:
            explainer = await asyncio.to_thread(RowExplainer, game.row, game.run)
            return await explainer.explain(game.run, generate, self._answers.embedder(game.run))
        finally:
            self.flight.end(number)
