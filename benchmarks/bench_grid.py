"""Measures the cost of a grid of explainers against its exact run alone: generated answers and wall time.

The grid is `exact` and six sampling explainers at five budgets on rows of distinct words; both studies run in
turns through coordinator, worker and files, as in `run --inline`, on a random model that is loaded once.

    python benchmarks/bench_grid.py --parameters 5m --rows 20 --players 10
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from made_up import build, write_study

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
            lengths = [options.players] * options.rows
            configs = {
                name: write_study(folder, model, lengths, runs, new_tokens=options.tokens, name=name)
                for name, runs in (("exact", EXACT), ("grid", GRID))
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
