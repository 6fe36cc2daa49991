"""Our side: rows explained with the engine, as in a worker."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mllm_shap import ConversationSnapshot

from mllm_shapx.benchmark.subject import Game
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.unit import ModelAnswers, RowExplainer
from mllm_shapx.models.base import ArrangesBatches, Model, Prompt
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.flight import Flight
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.results import SampleResult


@dataclass(slots=True)
class Turn:
    """Some complete games."""

    coalitions: int = 0
    """Number of evaluated coalitions."""
    seconds: float = 0.0
    """Wall time."""
    busy_seconds: float = 0.0
    """Part of `seconds` that the device spent in the model."""
    encode_seconds: float = 0.0
    """Time of the parallel encoding thread: templates, tokens, features of recordings."""
    own_seconds: float = 0.0
    """CPU time of the event loop's thread: sampling, rendering, scoring, estimating."""
    samples: list[SampleResult] = field(default_factory=list)
    """One per game, in the order of the games."""
    prompts: list[ConversationSnapshot] = field(default_factory=list)
    """The model's prompts."""


class Explainer:
    """Plays games on one model, several rows at a time.

    Args:
        model: The loaded model.
        rows_in_flight: Rows at a time; None for as many as fill the batches, as in `run`.
    """

    def __init__(self, model: Model, rows_in_flight: int | None) -> None:
        self.engine = Engine(model)
        self.flight = Flight(rows_in_flight, lambda: self.engine.stats.batch_size)
        self._answers = ModelAnswers(self.engine, {})

    async def play(self, games: Sequence[Game]) -> Turn:
        """Explain the games' rows, without shared answers; return times and samples."""
        turn = Turn()
        samples: dict[int, SampleResult] = {}
        self.flight.most = 0
        before = self.engine.stats
        own, started = time.thread_time(), time.perf_counter()
        room = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for place, game in enumerate(games):
                while not self.flight.has_room:
                    room.clear()
                    await room.wait()
                self.flight.begin(str(place), game.coalitions)
                group.create_task(self._explain(place, game, samples, turn, room.set))
        turn.seconds = time.perf_counter() - started
        turn.own_seconds = time.thread_time() - own
        after = self.engine.stats
        turn.busy_seconds = after.busy_seconds - before.busy_seconds
        turn.encode_seconds = after.encode_seconds - before.encode_seconds
        turn.samples = [samples[place] for place in range(len(games))]
        turn.coalitions = sum(sample.n_calls for sample in turn.samples)
        return turn

    async def play_sweep(self, game: Game, runs: Sequence[RunSpec]) -> tuple[int, int]:
        """Explain the game's row for all `runs`, sharing answers; return (coalitions, generated answers)."""
        rows: dict[str, RowExplainer] = {}
        evaluated = generated = 0
        for run in runs:
            if run.generation_key not in rows:
                rows[run.generation_key] = await asyncio.to_thread(RowExplainer, game.row, run)
            row = rows[run.generation_key]
            generate = partial(self._answers.answer, run, game.row.row_index)
            forcer = self._answers.forcer(row, run, runs)
            sample = await row.explain(run, generate, self._answers.embedder(run), forcer=forcer)
            evaluated += sample.n_calls
            generated += sample.model_calls
        return evaluated, generated

    async def _explain(
        self,
        place: int,
        game: Game,
        samples: dict[int, SampleResult],
        turn: Turn,
        on_end: Callable[[], None],
    ) -> None:
        async def generate(prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
            turn.prompts.extend(prompts.values())
            await self._answers.answer(game.run, game.row.row_index, prompts, keep)

        explainer = await asyncio.to_thread(RowExplainer, game.row, game.run)
        samples[place] = await explainer.explain(game.run, generate, self._answers.embedder(game.run))
        self.flight.end(str(place))
        on_end()


class Borrowed:
    """A model with another batch size that stays loaded when its engine closes."""

    def __init__(self, model: Model, batch_size: int | None) -> None:
        self._model = model
        self.max_batch_size = batch_size
        if isinstance(model, ArrangesBatches):
            self.batch_key = model.batch_key
            self.largest_batch = model.largest_batch
            self.encode_all = model.encode_all

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, snapshot: ConversationSnapshot, decoding: Any) -> Prompt:
        """See `Model.encode`."""
        return self._model.encode(snapshot, decoding)

    def close(self) -> None:
        """Do nothing: the model stays loaded."""
