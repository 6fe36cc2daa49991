"""Plans one config: its work on its rows, and its standing. Loads no model, writes nothing."""

from dataclasses import dataclass
from typing import Any

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.selection import Selection
from mllm_shapx.errors import DatasetError
from mllm_shapx.execution.dataset import open_selection, pinned
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
    """Check the runs, encoders, and on request the dataset and the model of a config.

    Args:
        loaded: The config.
        dataset: Whether to open the dataset and select rows.
        model: Whether to check the model, or ask its server.

    Raises:
        UsageError: When a part is unusable; the message names the config.
    """
    sweep = expand(loaded.experiment_set, str(loaded.path))
    encoders = dict.fromkeys(run.embedding for run in sweep.runs if run.embedding is not None)
    warnings = [*loaded.warnings, *sweep.warnings]
    if encoders:
        from mllm_shapx.models.identity import check_encoder  # imports mllm_shap: takes a second

        warnings += [text for config in encoders if (text := check_encoder(config, loaded.path)) is not None]
    scorers = [run for run in sweep.runs if run.shap.value_function is not None]
    if scorers:
        from mllm_shapx.explaining.value_models import check_value_model

        found_models = dict.fromkeys(check_value_model(run, loaded.path) for run in scorers)
        warnings += [text for text in found_models if text is not None]
    rows = None
    if dataset:
        selection = _selected(loaded, sweep)
        rows = len(selection.rows)
        warnings += [*selection.warnings, *_foreseen(loaded, sweep, selection)]
    found = None
    if model:
        from mllm_shapx.models.registry import check_model

        found = check_model(sweep.runs[0].model_settings, loaded.path)
    return CheckedConfig(len(sweep.runs), rows, found, tuple(warnings))


@dataclass(frozen=True, slots=True)
class DryRun:
    """Summary of a call of `run`, without its work."""

    to_make: int
    """Samples that are neither on disk nor quarantined."""
    samples: int
    runs: int
    rows: int
    output_uri: str
    warnings: tuple[str, ...]

    def to_text(self) -> str:
        """Return it as a sentence."""
        return (
            f"would make {self.to_make:,} of {self.samples:,} samples, of {self.runs:,} run(s) "
            f"and {self.rows:,} row(s), in {self.output_uri}"
        )


def dry_run(loaded: LoadedConfig, options: RunOptions) -> DryRun:
    """Return the work of `run` with these options, without doing it.

    Raises:
        UsageError: When `run` would refuse the call.
    """
    from mllm_shapx.execution.preparation import check_output, prepare

    study, warnings = prepare(loaded, options)
    outlook = Outlook(study.output_uri, study.runs, study.rows, study.players)
    outlook.refuse_hopeless(all_runs=True)
    check_output(study, options)
    there = standing(study.output_uri, study.runs, study.rows, study.players)
    samples = len(study.runs) * len(study.rows)
    kept = 0 if there is None or options.overwrite else there.samples_done + there.samples_failed
    return DryRun(
        to_make=samples - kept,
        samples=samples,
        runs=len(study.runs),
        rows=len(study.rows),
        output_uri=study.output_uri,
        warnings=(*warnings, *outlook.warnings()),
    )


def study_plan(loaded: LoadedConfig, *, skip_data: bool = False) -> StudyPlan:
    """Return the plan of a config.

    Args:
        loaded: The config.
        skip_data: Do not read the dataset; the plan then has runs but no figures.

    Raises:
        UsageError: When the runs contradict each other or the dataset cannot be used.
    """
    settings = loaded.experiment_set
    sweep = expand(settings, str(loaded.path))
    if skip_data:
        plan = make_plan(settings.experiment_set_id, sweep.runs, None, None, [])
        return StudyPlan(plan, None, (*loaded.warnings, *sweep.warnings))
    chosen = _selected(loaded, sweep)
    uri = join_uri(settings.output_root, settings.experiment_set_id)
    notes = Outlook(uri, sweep.runs, chosen.rows, chosen.players).large_games()
    return StudyPlan(
        make_plan(settings.experiment_set_id, sweep.runs, chosen.rows, chosen.players, notes),
        standing(uri, sweep.runs, chosen.rows, chosen.players),
        (*loaded.warnings, *sweep.warnings, *chosen.warnings),
    )


def _selected(loaded: LoadedConfig, sweep: Sweep) -> Selection:
    """Return a config's selected rows, from the dataset at the commit of its results.

    Raises:
        DatasetError: When the dataset cannot be used; the message names the config.
    """
    settings = loaded.experiment_set
    dataset = pinned(settings.dataset, join_uri(settings.output_root, settings.experiment_set_id), sweep.runs)
    try:
        return open_selection(loaded, sweep, dataset, settings.selection)[1]
    except DatasetError as error:
        raise DatasetError(f"{loaded.path}: {error}") from error


def _foreseen(loaded: LoadedConfig, sweep: Sweep, selection: Selection) -> list[str]:
    """Return warnings on rows that cannot be explained or take very long.

    Raises:
        DatasetError: When a run can explain no row.
    """
    settings = loaded.experiment_set
    uri = join_uri(settings.output_root, settings.experiment_set_id)
    outlook = Outlook(uri, sweep.runs, selection.rows, selection.players)
    try:
        outlook.refuse_hopeless(all_runs=False)
    except DatasetError as error:
        raise DatasetError(f"{loaded.path}: {error}") from error
    return outlook.warnings()
