"""Plans one config: its work on its rows, and its standing. Loads no model, writes nothing."""

from dataclasses import dataclass
from typing import Any

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.selection import Selection
from mllm_shapx.execution.dataset import naming, open_selection, pinned
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.planning.plan import Plan, make_plan
from mllm_shapx.planning.sweep import Sweep, expand
from mllm_shapx.records.storage import join_uri
from mllm_shapx.reporting.outlook import Outlook
from mllm_shapx.reporting.standing import Standing, standing


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """The plan of one config."""

    plan: Plan
    standing: Standing | None
    """How much of it is done; None if nothing is, or the dataset was not read."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data, with `standing`."""
        return {**self.plan.to_json(), "standing": None if self.standing is None else self.standing.to_json()}

    def to_text(self) -> str:
        """Return the plan as a table, and its standing."""
        text = self.plan.to_text()
        return text if self.standing is None else f"{text}\n\n{self.standing.to_text()}"


@dataclass(frozen=True, slots=True)
class CheckedConfig:
    """A config without faults."""

    runs: int
    rows: int | None
    """Number of selected rows; None if the dataset was not checked."""
    model: str | None
    """Description of the model; None if it was not checked."""
    warnings: tuple[str, ...]


def checked_config(loaded: LoadedConfig, *, dataset: bool, model: bool) -> CheckedConfig:
    """Check a config's runs and encoders; on request its rows, and its model or the model's server.

    Raises:
        UsageError: When a part is unusable; the message names the config.
    """
    sweep = expand(loaded.experiment_set, str(loaded.path))
    warnings: list[str | None] = [*loaded.warnings, *sweep.warnings]
    for encoder in dict.fromkeys(run.embedding for run in sweep.runs if run.embedding is not None):
        from mllm_shapx.models.identity import check_encoder  # imports mllm_shap: takes a second

        warnings.append(check_encoder(encoder, loaded.path))
    for run in sweep.runs:
        if run.shap.value_function is not None:
            from mllm_shapx.explaining.value_models import check_value_model

            warnings.append(check_value_model(run, loaded.path))
    rows = None
    if dataset:
        with naming(loaded):
            selection = _selection(loaded, sweep)
            outlook = _outlook(loaded, sweep, selection)
            outlook.refuse_hopeless(all_runs=False)
        rows = len(selection.rows)
        warnings += [*selection.warnings, *outlook.warnings()]
    found = None
    if model:
        from mllm_shapx.models.registry import check_model

        found = check_model(sweep.runs[0].model_settings, loaded.path)
    return CheckedConfig(len(sweep.runs), rows, found, tuple(dict.fromkeys(filter(None, warnings))))


def dry_run(loaded: LoadedConfig, options: RunOptions) -> tuple[str, tuple[str, ...]]:
    """Return what `run` would make with these options, as a sentence, and warnings.

    Raises:
        UsageError: When `run` would refuse the call.
    """
    from mllm_shapx.execution.preparation import check_output, prepare

    study, warnings = prepare(loaded, options)
    outlook = Outlook(study.output_uri, study.runs, study.rows, study.players)
    outlook.refuse_hopeless(all_runs=True)
    check_output(study)
    there = standing(study.output_uri, study.runs, study.rows, study.players)
    runs, rows = len(study.runs), len(study.rows)
    kept = 0 if there is None or options.overwrite else there.samples_done + there.samples_failed
    text = (
        f"would make {runs * rows - kept:,} of {runs * rows:,} samples, of {runs:,} run(s) and {rows:,} "
        f"row(s), in {study.output_uri}"
    )
    return text, (*warnings, *outlook.warnings())


def study_plan(loaded: LoadedConfig, *, skip_data: bool = False) -> StudyPlan:
    """Return the plan of a config; with `skip_data`, without the figures that its rows decide.

    Raises:
        UsageError: When the runs contradict each other or the dataset cannot be used.
    """
    settings = loaded.experiment_set
    sweep = expand(settings, str(loaded.path))
    if skip_data:
        plan = make_plan(settings.experiment_set_id, sweep.runs, None, None, [])
        return StudyPlan(plan, None, (*loaded.warnings, *sweep.warnings))
    with naming(loaded):
        chosen = _selection(loaded, sweep)
    notes = _outlook(loaded, sweep, chosen).large_games()
    return StudyPlan(
        make_plan(settings.experiment_set_id, sweep.runs, chosen.rows, chosen.players, notes),
        standing(_uri(loaded), sweep.runs, chosen.rows, chosen.players),
        (*loaded.warnings, *sweep.warnings, *chosen.warnings),
    )


def _uri(loaded: LoadedConfig) -> str:
    return join_uri(loaded.experiment_set.output_root, loaded.experiment_set.experiment_set_id)


def _selection(loaded: LoadedConfig, sweep: Sweep) -> Selection:
    """Return a config's selected rows, from the dataset at the commit of its results."""
    settings = loaded.experiment_set
    dataset = pinned(settings.dataset, _uri(loaded), sweep.runs)
    return open_selection(loaded, sweep, dataset, settings.selection)[1]


def _outlook(loaded: LoadedConfig, sweep: Sweep, selection: Selection) -> Outlook:
    return Outlook(_uri(loaded), sweep.runs, selection.rows, selection.players)
