"""Measures a coalition's cost outside the model: the engine and mllm_shap with an instant model.

`python benchmarks/bench_overhead.py` plays exact games of 12, 13 and 14 players; `--players` sets others.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import click
import numpy as np
from mllm_shap import ConversationSnapshot, ExplainRunner, GenerationRecord
from mllm_shap.value.generation_records import generation_record_from_text
from numpy.typing import NDArray

from mllm_shapx.benchmark.ours import Explainer
from mllm_shapx.benchmark.subject import RowRun
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.data.conversations import Row
from mllm_shapx.explaining.coalitions import Keep
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config
from mllm_shapx.models.base import Answer, Decoding, ModelIdentity, ModelReport, Prompt
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand


@dataclass(frozen=True, slots=True)
class Overhead:
    """Microseconds per coalition of one exact game, with almost no time in the model."""

    coalitions: int
    ours: float
    """Total: sampling, rendering, the engine, scoring, estimating."""
    ours_without_engine: float
    """The same with direct answers."""
    library: float
    """mllm_shap's own runner on an instant backend."""
    largest_difference: float
    """Maximum difference between our values and the library's."""


@dataclass(frozen=True, slots=True)
class _Words:
    """A prompt of text only."""

    text: str

    @property
    def length(self) -> int:
        return 1


class InstantModel:
    """Answers with the user's words, so that all coalitions have different answers."""

    identity = ModelIdentity("none", "answers at once", None, "float32", "cpu")
    report = ModelReport()
    max_batch_size = 256

    def encode(self, snapshot: ConversationSnapshot, decoding: Decoding) -> _Words:
        """Return the user's words, which are the answer."""
        del decoding
        return _Words(instant_answer(snapshot))

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Return the words."""
        del decoding, seeds
        return [Answer(prompt.text) for prompt in prompts if isinstance(prompt, _Words)]

    def embed(self, answers: Sequence[Answer], mode: str, reducer: str) -> list[NDArray[np.float64]]:
        """Do nothing: the similarity of this game reads texts."""
        del mode, reducer
        return [np.zeros(0) for _ in answers]

    def close(self) -> None:
        """Do nothing."""


class InstantBackend:
    """The same model for mllm_shap's runner."""

    model_id = InstantModel.identity.model_id

    async def generate(self, snapshot: ConversationSnapshot, generation: object) -> GenerationRecord:
        """Answer at once."""
        del generation
        return generation_record_from_text(instant_answer(snapshot))


def instant_answer(snapshot: ConversationSnapshot) -> str:
    """Return the words of the user, in their order."""
    return " ".join(message.text for message in snapshot.messages() if message.role.value == "user")


async def measure_overhead(num_players: int) -> Overhead:
    """Play one exact game of `num_players` players with the engine, without it, and with the library."""
    game = instant_game(num_players)
    explainer = Explainer(InstantModel(), rows_in_flight=1)
    try:
        turn = await explainer.play([game])
    finally:
        await explainer.engine.aclose()
    started = time.perf_counter()
    await explain_run(game.row, open_row(game.row, game.run), game.run, _hand_over, _embed_nothing)
    direct = time.perf_counter() - started
    seed = game.run.seed_for(game.row.row_index)
    config = explain_config(game.run, GameSettings("exact", game.run.budget, seed), num_players)
    snapshot = open_row(game.row, game.run).snapshot
    started = time.perf_counter()
    output = await ExplainRunner(config, backend=InstantBackend()).explain(snapshot)
    library = time.perf_counter() - started
    each = 1e6 / game.coalitions
    values = zip(turn.samples[0].player_values(), output.result.values, strict=True)
    return Overhead(
        coalitions=game.coalitions,
        ours=turn.seconds * each,
        ours_without_engine=direct * each,
        library=library * each,
        largest_difference=max(abs((ours or 0.0) - theirs) for ours, theirs in values),
    )


def instant_game(num_players: int) -> RowRun:
    """Return an exact game on a row of `num_players` words."""
    text = " ".join(f"word{place}" for place in range(num_players))
    row = Row(
        row_index=0,
        texts=(text,),
        recordings=(None,),
        sample_rates=(None,),
        language="en",
        original_language="en",
    )
    return RowRun(row, _exact_run(), num_players)


def _exact_run() -> RunSpec:
    settings = ExperimentSet.model_validate(
        {
            "experiment_set_id": "overhead",
            "connector": "hf_text",
            "generation": {"text_temperature": 0.0},
            "experiments": [{"explainer_type": "exact"}],
        }
    )
    return expand(settings).runs[0]


async def _hand_over(prompts: Mapping[int, ConversationSnapshot], keep: Keep) -> None:
    for mask, snapshot in prompts.items():
        keep(mask, Answer(instant_answer(snapshot)))


async def _embed_nothing(answers: Sequence[Answer]) -> list[NDArray[np.float64]]:
    return [np.zeros(0) for _ in answers]


@click.command()
@click.option("--players", type=int, multiple=True, default=(12, 13, 14), help="Players of a game.")
def main(players: tuple[int, ...]) -> None:
    """Print the microseconds per coalition outside the model."""
    for count in players:
        found = asyncio.run(measure_overhead(count))
        click.echo(
            f"{found.coalitions:,} coalitions: {found.ours:,.0f} us each ({found.ours_without_engine:,.0f} "
            f"without the engine), in mllm_shap {found.library:,.0f}"
        )


if __name__ == "__main__":
    main()
