"""The benchmark of a config: warm up, hold the contest, try batch sizes, report."""

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from mllm_shapx.benchmark.contest import Contest
from mllm_shapx.benchmark.library import OTHER_PROMPTS, LibraryError, LibraryRunner, comparable
from mllm_shapx.benchmark.ours import Explainer, Turn
from mllm_shapx.benchmark.plain import PlainGenerate
from mllm_shapx.benchmark.report import BenchReport
from mllm_shapx.benchmark.subject import RowRun, Subject, take
from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.explaining.settings import decoding
from mllm_shapx.models.flight import FEWEST_ROWS
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.planning.plan import make_plan

Say = Callable[[str], None]

ENOUGH_S = 1.0
"""Our warm-up grows until one turn takes these seconds."""
GROWING_SHARE = 0.25
"""While the batch size grows, the warm-up continues until a turn takes this share of the time."""
FIRST_COALITIONS, MOST_COALITIONS = 64, 1 << 15
"""Coalitions of the first and of the largest turn of the warm-up."""
LIBRARY_COALITIONS = 16
MOST_ROWS = 64
"""Rows to read if the user gives no number."""
MOST_LONG_ROWS = 3
"""Rows that share the time if the user gives a number of rows; more rows take longer."""
TRIAL_SHARE = 1 / 3
"""Approximate time to try a batch size, as a share of a contestant's time."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `mllm-shapx bench`."""

    rows: int | None = None
    """Rows to explain; None for as many as the time allows."""
    seconds: float = 20.0
    """Approximate measuring time of each contestant; the library gets three times as much."""
    rows_in_flight: int | None = None
    """Rows in flight; None for as many as fill the batches."""


def bench(loaded: LoadedConfig, options: BenchOptions, say: Say) -> BenchReport:
    """Measure a config on this machine; `say` gets a line for each step.

    Raises:
        UsageError: For all faults that the user can fix.
    """
    subject = Subject(loaded)
    if subject.run.device == "cpu":
        # mllm_shap's backend uses any visible GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return asyncio.run(_bench(subject, options, say))


async def _bench(subject: Subject, options: BenchOptions, say: Say) -> BenchReport:
    load_average, seconds = os.getloadavg()[0], options.seconds
    say(f"loading {subject.run.model_id}")
    model = await asyncio.to_thread(subject.load_model)
    ours = Explainer(model, options.rows_in_flight)
    contest = Contest(ours, comparable(subject.run, model.identity.dtype))
    notes: list[str] = []
    try:
        rows = await asyncio.to_thread(lambda: list(islice(subject.games(model), options.rows or MOST_ROWS)))
        say("warming up")
        warm = await _warm_up(ours, rows, GROWING_SHARE * seconds)
        await _warm_up_library(contest, subject, rows[0], notes, say)
        if isinstance(model, HfTextModel):
            say("looking for the best batch size of plain generate")
            contest.generate = PlainGenerate(model, decoding(subject.run))
            await asyncio.to_thread(contest.generate.find_batch_size, warm.prompts, seconds)
        in_time = int(warm.rate * seconds)
        # A game that is too long is cut to the time. Without a number of rows, one turn takes half of it.
        most = max(FIRST_COALITIONS, in_time // min(options.rows or 1, MOST_LONG_ROWS))
        games = take(rows, in_time / 2 if options.rows is None else math.inf, most)
        await contest.play(games, seconds, say)
        if contest.runner is not None:
            await contest.runner.aclose()  # its memory may be needed for larger batches
        batch_size = ours.engine.stats.batch_size
        # The contest may have one long row; a study should still use several.
        rows_in_flight = ours.flight.fixed or max(FEWEST_ROWS, ours.flight.most)
        trials = await try_batch_sizes(ours, games, int(TRIAL_SHARE * in_time), rows_in_flight, say)
    finally:
        await ours.engine.aclose()
    players = {game.row.row_index: game.num_players for game in games}
    return BenchReport(
        model=model.identity,
        load_average=load_average,
        rows=len(games),
        contest=contest,
        sharing_factor=make_plan("", subject.sweep, list(players), players).totals()["sharing_factor"],
        batch_size=batch_size,
        rows_in_flight=rows_in_flight,
        trials=trials,
        notes=[*notes, *_remarks(contest, games, tried=bool(trials))],
    )


async def _warm_up(ours: Explainer, rows: Sequence[RowRun], patience: float) -> Turn:
    """Play ever larger games until the batch size is stable or a turn takes `patience` seconds.

    Returns:
        The last turn.
    """
    await ours.play([rows[0].smallest()])  # the first call initializes libraries
    most = FIRST_COALITIONS
    while True:
        size = ours.engine.stats.batch_size
        turn = await ours.play(take(rows, most, most))
        enough = ENOUGH_S if ours.engine.stats.batch_size == size else max(ENOUGH_S, patience)
        if turn.seconds >= enough or not most <= turn.coalitions < MOST_COALITIONS:
            return turn
        most *= 4


async def _warm_up_library(
    contest: Contest, subject: Subject, game: RowRun, notes: list[str], say: Say
) -> None:
    """Add the library's runner to the contest, or a note if it cannot run."""
    if subject.run.connector != "hf_text":
        notes.append(f"mllm_shap has no backend for connector {subject.run.connector!r}: no ratio")
        return
    say("loading the model into mllm_shap's own backend")
    runner = LibraryRunner(subject.run, subject.model_path)
    try:
        await runner.explain(game.smallest())  # loads the model
        started = time.perf_counter()
        output = await runner.explain(game.limited_to(LIBRARY_COALITIONS))
    except LibraryError as error:
        notes.append(f"no ratio: {error}")
        return
    contest.runner, contest.runner_rate = runner, output.metrics.requested / (time.perf_counter() - started)
    if runner.makes_other_prompts:
        notes.append(OTHER_PROMPTS)


async def try_batch_sizes(
    ours: Explainer, games: Sequence[RowRun], coalitions: int, rows_in_flight: int, say: Say
) -> dict[int, float]:
    """Return coalitions per second with the batch size found, its half and its double.

    Each plays `coalitions` of the games; empty if these are less than a batch.
    """
    in_all = sum(game.coalitions for game in games)
    # Few rows cannot fill a larger batch.
    found = min(ours.engine.stats.batch_size, 1 << (in_all.bit_length() - 1))
    if coalitions < found:
        return {}
    games = take(games, coalitions, coalitions)
    total = sum(game.coalitions for game in games)
    rates: dict[int, float] = {}
    # Twice: bursts of other load only lower a rate.
    for size in 2 * [size for size in (found, found // 2, 2 * found) if 1 <= size <= total]:
        say(f"trying batch size {size} with {rows_in_flight} row(s) in flight")
        explainer = Explainer(ours.engine.model, rows_in_flight, size)
        turn = await explainer.play(games)
        await explainer.engine.aclose(keep_model=True)
        rates[size] = max(turn.rate, rates.get(size, 0.0))
    return rates


def _remarks(contest: Contest, games: Sequence[RowRun], *, tried: bool) -> list[str]:
    """Return notes on the origin of the figures."""
    notes = []
    if any(game.run.explainer_type != "exact" for game in games):
        notes.append(
            "some rows have too many players for the time at hand; part of their coalitions was asked"
        )
    if contest.runner is not None and not contest.comparable:
        notes.append(
            "values were not compared with the library's: answers are sampled or cut, dtype is not float32, "
            "probabilities are scored, or the similarity is not the library's"
        )
    if not tried:
        notes.append("the time did not suffice to try other batch sizes; --seconds gives more")
    return notes
