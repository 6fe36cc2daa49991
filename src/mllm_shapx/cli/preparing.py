"""Commands before a study: check a config, plan it, measure it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_shapx.cli.group import main
from mllm_shapx.cli.options import ROWS, ROWS_IN_FLIGHT, YEAR, with_configs
from mllm_shapx.config.files import load_configs, raise_all
from mllm_shapx.errors import UsageError
from mllm_shapx.terminal import Number, flag, number, say, say_json, warn


@main.command()
@with_configs
@flag("--check-dataset", "Open the dataset and select the rows too.")
@flag("--check-model", "Look at the model too; a server is asked for its models.")
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
        warn(loaded.path, found.warnings)
        rows = "" if found.rows is None else f", {found.rows:,} row(s)"
        model = "" if found.model is None else f", {found.model}"
        name = loaded.experiment_set.experiment_set_id
        say(f"{loaded.path}: ok: {name}, {found.runs} run(s){rows}{model}")
    raise_all(errors)


@main.command()
@with_configs
@flag("--json as_json", "Print the plan as data.")
@flag("--skip-data", "Do not touch the dataset: runs only, no figures.")
def plan(configs: Sequence[Path], as_json: bool, skip_data: bool) -> None:
    """Show the runs, the rows, what they will ask of the model, and what of it is done."""
    from mllm_shapx.execution.study_plan import study_plan

    plans = []
    for loaded in load_configs(configs):
        plans.append(study_plan(loaded, skip_data=skip_data))
        warn(loaded.path, plans[-1].warnings)
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
@number("--rows", ROWS, "Rows to explain; as many as the time allows.")
@number(
    "--seconds",
    Number(0, *YEAR, above=True),
    "About how long each contestant is measured; mllm_shap three times as long.",
    20.0,
)
@number("--rows-in-flight", ROWS_IN_FLIGHT, "Rows side by side; as many as fill the batches by default.")
@flag("--json as_json", "Print the figures as data.")
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
