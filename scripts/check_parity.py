"""Compares the values of a finished output directory with mllm_shap's own runner on its own backend.

    python scripts/check_parity.py experiments_output/demo --config configs/demo.json

`mllm_shap.ExplainRunner` explains every row of every run again, with the library's `transformers` backend and
the same settings and seed, on the prompts of the tokenizer's apply_chat_template: the backend's own prompts
have a second BOS if tokenizer and template both write one. Exits with 1 if a value differs by more than the
tolerance, with 2 if a sample is missing.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mllm_shap import ExplainResult

from mllm_shapx.benchmark.library import OTHER_PROMPTS, LibraryRunner
from mllm_shapx.benchmark.subject import RowRun
from mllm_shapx.config.loading import LoadedConfig, load_config
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.selection import select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import ShapxError, UsageError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.models.registry import model_identity
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.planning.sweep import expand, player_rule
from mllm_shapx.records.layout import RunLayout
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.storage import open_storage

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference between one sample and the library's values of its row."""

    run_name: str
    row_index: int
    largest: float


def main() -> int:
    """Compare and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="?", default="experiments_output/demo")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.json"))
    parser.add_argument("--rows", type=int, help="compare only so many of the selected rows")
    options = parser.parse_args()
    try:
        return asyncio.run(compare(load_config(options.config), options.directory, options.rows))
    except ShapxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


async def compare(loaded: LoadedConfig, directory: str, rows: int | None) -> int:
    """Compare all samples of `directory`, print the largest difference, return the exit code."""
    started = time.monotonic()
    runs = expand(loaded.experiment_set).runs
    _refuse_incomparable(runs)
    model_path, _ = model_identity(runs[0].model_settings, loaded.path)
    library = LibraryRunner(runs[0], model_path)
    worst: Difference | None = None
    compared, coalitions = 0, 0
    try:
        for game, sample in _samples(loaded, runs, directory, rows):
            output = await library.explain(game)
            found = Difference(game.run.name, game.row.row_index, largest_difference(sample, output.result))
            compared, coalitions = compared + 1, coalitions + output.metrics.requested
            if worst is None or found.largest > worst.largest:
                worst = found
            if sys.stderr.isatty() or compared % len(runs) == 0:
                print(f"{compared} sample(s), largest difference {worst.largest:.3g}", file=sys.stderr)
    finally:
        await library.aclose()
    if worst is None:
        raise UsageError(f"{directory} holds no sample of the config's rows")
    if library.makes_other_prompts:
        print(f"note: {OTHER_PROMPTS}")
    agreed = worst.largest <= TOLERANCE
    print(
        f"{compared} sample(s) of {len(runs)} run(s), {coalitions:,} coalitions asked again in "
        f"{time.monotonic() - started:.0f} s: the largest difference is {worst.largest:.3g} "
        f"({worst.run_name}, row {worst.row_index}), {'within' if agreed else 'MORE THAN'} {TOLERANCE:g}"
    )
    return 0 if agreed else 1


def largest_difference(sample: SampleResult, result: ExplainResult) -> float:
    """Return the largest difference between the values of both, infinity if their numbers differ."""
    values = sample.player_values()
    if len(values) != len(result.values):
        return float("inf")
    pairs = [
        *zip(values, result.values, strict=True),
        (sample.base_value, result.base_value),
        (sample.grand_value, result.grand_value),
    ]
    return max(abs(own - other) if own is not None else float("inf") for own, other in pairs)


def _samples(
    loaded: LoadedConfig, runs: tuple[RunSpec, ...], directory: str, count: int | None
) -> Iterator[tuple[RowRun, SampleResult]]:
    """Yield every sample with its game, row by row."""
    settings = loaded.experiment_set
    table = open_table(settings.dataset, loaded.path)
    selection = select_rows(
        table, settings.dataset, settings.selection, settings.modality, player_rule(settings, loaded.path)
    )
    storage = open_storage(directory)
    for row_index in selection.rows[:count]:
        row = load_row(table, row_index, settings.dataset, settings.modality)
        for run in runs:
            players = open_row(row, run).players.num_players
            path = RunLayout(run.name).sample(row_index)
            if not storage.exists(path):
                raise UsageError(
                    f"{directory}/{path} is not there; finish the study first: mllm-shapx run "
                    f"--config {loaded.path} --resume"
                )
            try:
                sample = SampleResult.from_bytes(run.name, storage.read_bytes(path))
            except ValueError as error:
                raise UsageError(f"{directory}/{path} is damaged: {error}") from error
            yield RowRun(row, run, players), sample


def _refuse_incomparable(runs: tuple[RunSpec, ...]) -> None:
    other = [
        run.name
        for run in runs
        if run.hierarchical is not None
        or not run.generation.is_greedy
        or run.connector_kwargs.strip_reasoning
        or run.shap.players == "tokens"
        or run.player_rule.kept_words
    ]
    if other:
        raise UsageError(
            "mllm_shap has no equal of these runs (hierarchical, sampled, with strip_reasoning, with token "
            f"players or kept words): {', '.join(other)}"
        )


if __name__ == "__main__":
    sys.exit(main())
