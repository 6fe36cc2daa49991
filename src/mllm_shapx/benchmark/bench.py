"""The benchmark of a config: warm up, hold the contest, try settings, report."""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from mllm_shapx.benchmark.options import BenchOptions
from mllm_shapx.benchmark.ours import Explainer
from mllm_shapx.benchmark.probes import Prober, Recommendation
from mllm_shapx.benchmark.report import BenchReport, Machine
from mllm_shapx.benchmark.rounds import Contest, contest
from mllm_shapx.benchmark.sharing import measure_sharing
from mllm_shapx.benchmark.subject import Game, Subject
from mllm_shapx.benchmark.warmup import Ready, warm_up
from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.models.flight import FEWEST_ROWS

Say = Callable[[str], None]
PROBE_SHARE = 0.05
"""Time for each setting, as a share of a contestant's time."""
PROBES_SHARE = 2.0
"""Approximate time for all settings together, in contestant's times."""
MOST_PROBE_ROWS = 4
FEWEST_COALITIONS = 16
FEWEST_PROBES = 4
"""Fewer tried settings give no recommendation."""
SHARING_SHARE = 0.5
"""Time for the whole sweep, as a share of a contestant's time."""


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
    say(f"loading {subject.run.model_id}")
    model = await asyncio.to_thread(subject.load_model)
    machine = Machine.describe(model.identity)
    ours = Explainer(model, options.rows_in_flight)
    try:
        ready = await warm_up(subject, model, ours, options, say)
        try:
            result = await contest(ready.games, ready.contestants, options, say)
        finally:
            if ready.contestants.library is not None:
                await ready.contestants.library.aclose()
        say("running the whole sweep on some rows")
        sharing = await measure_sharing(
            ours, ready.games, subject.sweep, SHARING_SHARE * options.seconds * ready.rate
        )
        recommended = await _recommend(ours, ready, options, say)
        return BenchReport(
            model_id=subject.run.model_id,
            machine=machine,
            rows=len(ready.games),
            contest=result,
            raw_batch_size=None if ready.raw is None else ready.raw.batch_size,
            raw_rates={} if ready.raw is None else ready.raw.rates,
            sharing=sharing,
            recommended=recommended,
            batch_size=ours.engine.stats.batch_size,
            rows_in_flight=ours.flight.most,
            notes=[*ready.notes, *_remarks(result, ready, recommended)],
        )
    finally:
        await ours.engine.aclose()


async def _recommend(ours: Explainer, ready: Ready, options: BenchOptions, say: Say) -> Recommendation:
    """Try settings, each on coalitions for about two batches of the `auto` size."""
    # The contest may have one long row; a study should still use several.
    found, rows = ours.engine.stats.batch_size, max(FEWEST_ROWS, ours.flight.most)
    seconds = PROBES_SHARE * options.seconds
    games = _probe_games(ready, max(2 * found, int(ready.rate * PROBE_SHARE * options.seconds)))
    total = sum(game.coalitions for game in games)
    if FEWEST_PROBES * total > seconds * ready.rate:
        return Recommendation(found, rows)
    start = min(found, 1 << (total.bit_length() - 1))  # few rows cannot fill a larger batch
    largest = sum(sorted(game.coalitions for game in games)[-rows:])
    prober = Prober(ours.engine.model, games, largest, say)
    best = await prober.recommend(start, rows, seconds)
    # If the largest batch of these rows is the best, keep the size found with more rows.
    return replace(best, batch_size=found) if best.batch_size == start < found else best


def _probe_games(ready: Ready, total: int) -> Sequence[Game]:
    """Return games of the contest with `total` coalitions in total, or all games; several if possible."""
    most = max(FEWEST_COALITIONS, -(-total // min(MOST_PROBE_ROWS, len(ready.games))))
    games: list[Game] = []
    for game in ready.games:
        if sum(each.coalitions for each in games) >= total:
            break
        games.append(game.limited_to(most))
    return games


def _remarks(result: Contest, ready: Ready, recommended: Recommendation) -> list[str]:
    """Return remarks on the origin of the figures."""
    remarks = []
    if any(game.run.explainer_type != "exact" for game in ready.games):
        remarks.append(
            "some rows have too many players for the time at hand; part of their coalitions was asked"
        )
    if result.library_sampled:
        remarks.append(
            "mllm_shap's runner was given a part of some rows' coalitions; --seconds gives it more time"
        )
    if ready.contestants.library is not None and not ready.contestants.comparable:
        remarks.append(
            "values were not compared with the library's: answers are sampled or cut, dtype is not float32, "
            "probabilities are scored, or the similarity is not the library's"
        )
    if not recommended.probes:
        remarks.append(
            "the time did not suffice to try other batch sizes and rows in flight; --seconds gives more"
        )
    return remarks
