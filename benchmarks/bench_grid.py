"""Measures the cost of a grid of explainers against its exact run alone: generated answers and wall time.

The grid is `exact` and six sampling explainers at five budgets on rows of distinct words; both studies run in
turns through coordinator, worker and files, as in `run --inline`, on a random model that is loaded once.

    python benchmarks/bench_grid.py --parameters 5m --rows 20 --players 10
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_engine import build

from mllm_shapx.config.loading import load_config
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.run import run_config
from mllm_shapx.models.base import Model
from mllm_shapx.models.registry import load_model
from mllm_shapx.planning.sweep import expand
from mllm_shapx.reporting.progress import ProgressReporter

FRACTIONS = [0.05, 0.1, 0.2, 0.4, 0.8]
SAMPLERS = ("limited_mc", "standard_mc", "limited_cc", "standard_cc", "limited_neyman", "standard_neyman")
EXACT: list[dict[str, Any]] = [{"explainer_type": "exact"}]
GRID = EXACT + [{"explainer_type": kind, "fractions": FRACTIONS} for kind in SAMPLERS]
SYLLABLES = ("ba", "ko", "mi", "tu", "re", "sol", "fen", "dar", "lim", "voy", "gas", "pel")


def write_rows(path: Path, rows: int, players: int) -> None:
    """Write prompts of `players` distinct words each."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(400)})
    prompts = [" ".join(rng.sample(words, players)) for _ in range(rows)]
    pq.write_table(pa.table({"prompt": prompts}), path)


def write_config(
    folder: Path, name: str, model: Path, experiments: list[dict[str, Any]], tokens: int
) -> Path:
    """Write a study's config, with its results in `folder`."""
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                "experiment_set_id": name,
                "output_root": str(folder / "out"),
                "connector": "hf_text",
                "connector_kwargs": {"model_id": str(model), "dtype": "float32"},
                "device": "cpu",
                "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
                "selection": {"shuffle_seed": None},
                "generation": {"max_new_tokens": tokens, "text_temperature": 0.0},
                "wandb": {"enabled": False},
                "runtime": {"progress_bar": False},
                "experiments": experiments,
            }
        )
    )
    return path


def explain(config: Path, model: Model) -> tuple[float, int]:
    """Run a new study; return its seconds and generated answers."""
    loaded = load_config(config)
    started = time.perf_counter()
    with Path("/dev/null").open("w") as nowhere, ProgressReporter(nowhere, interactive=False) as reporter:
        outcome = run_config(loaded, RunOptions(), reporter, inline=True, load=lambda _: model)
    return time.perf_counter() - started, outcome.model_calls


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", default="5m", choices=("5m", "200m"))
    parser.add_argument("--model", type=Path, help="a model directory instead of a random model")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--players", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"exact": [], "grid": []}
    answers: dict[str, int] = {}
    ready: Model | None = None
    with tempfile.TemporaryDirectory() as root:
        base = Path(root)
        model = options.model.resolve() if options.model else base / "model"
        if not options.model:
            build(options.parameters, model)
        for number in range(options.rounds):
            folder = base / str(number)
            folder.mkdir()
            write_rows(folder / "rows.parquet", options.rows, options.players)
            studies = {"exact": EXACT, "grid": GRID}
            configs = {
                name: write_config(folder, name, model, experiments, options.tokens)
                for name, experiments in studies.items()
            }
            if ready is None:
                run = expand(load_config(configs["exact"]).experiment_set).runs[0]
                ready = load_model(run.model_settings, model)
                ready.close = lambda: None  # type: ignore[method-assign]  # it stays loaded for all studies
            for name, config in configs.items():
                took, answers[name] = explain(config, ready)
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "rows": options.rows,
                "coalitions_of_the_exact_run": options.rows * 2**options.players,
                "answers_generated": answers,
                "seconds": medians,
                "grid_over_exact": medians["grid"] / medians["exact"],
                "runs_in_grid": 1 + len(SAMPLERS) * len(FRACTIONS),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
