"""Runs `mllm-shapx bench` on rows of ten words with a random Llama.

    python benchmarks/bench_engine.py --parameters 5m

mllm_shap's own runner and plain batched `generate` answer the same coalitions in turns.
"""

import tempfile
from pathlib import Path

import click
from made_up import SHAPES, build, write_study

from mllm_shapx.benchmark.bench import BenchOptions, bench
from mllm_shapx.config.loading import load_config

ROWS = 12


@click.command()
@click.option("--parameters", type=click.Choice(sorted(SHAPES)), default="5m", show_default=True)
@click.option("--players", type=int, default=10, show_default=True, help="Words of a row.")
@click.option("--new-tokens", type=int, default=16, show_default=True)
@click.option("--seconds", type=float, default=20.0, show_default=True, help="As of `bench`.")
def main(parameters: str, players: int, new_tokens: int, seconds: float) -> None:
    """Measure and print the table of `bench`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(parameters, folder / "model")
        config = write_study(
            folder, folder / "model", [players] * ROWS, [{"explainer_type": "exact"}], new_tokens=new_tokens
        )
        found = bench(load_config(config), BenchOptions(seconds=seconds), click.echo)
        click.echo(found.to_text())


if __name__ == "__main__":
    main()
