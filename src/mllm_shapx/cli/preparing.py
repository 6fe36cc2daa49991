"""Commands before a study: check a config, plan it, measure it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mllm_shapx.cli.group import main
from mllm_shapx.cli.options import A_YEAR, ROWS, ROWS_IN_FLIGHT, YEAR_S, with_configs
from mllm_shapx.config.files import load_configs, raise_all
from mllm_shapx.errors import UsageError
from mllm_shapx.terminal import Number, say, say_json


@main.command()
@with_configs
@click.option("--check-dataset", is_flag=True, help="Open the dataset and select the rows too.")
@click.option("--check-model", is_flag=True, help="Look at the model too; a server is asked for its models.")
def validate(configs: Sequence[Path], check_dataset: bool, check_model: bool) -> None:
    """Say whether configs can be used; list everything that is wrong with them."""
    from mllm_shapx.execution.study_plan import checked_config

    errors = []
    for loaded in load_configs(configs):
        try:
            found = checked_config(loaded, dataset=check_dataset, model=check_model)
        except UsageError as error:
            errors.append(error)
            continue
        _warn(loaded.path, found.warnings)
        rows = "" if found.rows is None else f", {found.rows:,} row(s)"
        model = "" if found.model is None else f", {found.model}"
        name = loaded.experiment_set.experiment_set_id
        say(f"{loaded.path}: ok: {name}, {found.runs} run(s){rows}{model}")
    raise_all(errors)


@main.command()
@with_configs
@click.option("--json", "as_json", is_flag=True, help="Print the plan as data.")
@click.option("--skip-data", is_flag=True, help="Do not touch the dataset: runs only, no figures.")
def plan(configs: Sequence[Path], as_json: bool, skip_data: bool) -> None:
    """Show the runs, the rows, what they will ask of the model, and what of it is done."""
    from mllm_shapx.execution.study_plan import study_plan

    plans = []
    for loaded in load_configs(configs):
        plans.append(study_plan(loaded, skip_data=skip_data))
        _warn(loaded.path, plans[-1].warnings)
    if as_json:
        data = [each.to_json() for each in plans]
        say_json(data[0] if len(data) == 1 else data)
    else:
        say("\n\n".join(each.to_text() for each in plans))


@main.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from mllm_shapx.config.loading import schema as config_schema

    say_json(config_schema())


@main.command()
@with_configs
@click.option("--rows", type=ROWS, help="Rows to explain; as many as the time allows.")
@click.option(
    "--seconds",
    type=Number(0, YEAR_S, A_YEAR, above=True),
    default=20.0,
    show_default=True,
    help="About how long each contestant is measured; mllm_shap three times as long.",
)
@click.option(
    "--rows-in-flight",
    type=ROWS_IN_FLIGHT,
    help="Rows side by side; as many as fill the batches by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as data.")
def bench(configs: Sequence[Path], as_json: bool, **options: Any) -> None:
    """Measure a config on this machine, beside mllm_shap's own runner and the bare model."""
    from mllm_shapx.benchmark.bench import BenchOptions
    from mllm_shapx.benchmark.bench import bench as measure

    if len(configs) > 1:
        raise UsageError(f"bench measures one config at a time, not {len(configs)}")
    (loaded,) = load_configs(configs)
    found = measure(loaded, BenchOptions(**options), lambda text: say(text, err=True))
    if as_json:
        say_json(found.to_json())
    else:
        say(found.to_text())


def _warn(config: Path, warnings: Sequence[str]) -> None:
    for warning in warnings:
        say(f"warning: {config}: {warning}", err=True)
