"""Plans one config: what it will do on its rows, and how much is done. Loads no model, writes nothing."""

from dataclasses import dataclass, replace

from mllm_shapx.config.loading import LoadedConfig
from mllm_shapx.data.selection import Selection, select_rows
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import DatasetError
from mllm_shapx.models.control_tokens import control_token_warnings
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
    """How much of it is done; None when nothing is, or when the dataset was not read."""
    warnings: tuple[str, ...]


def study_plan(loaded: LoadedConfig, *, skip_data: bool = False) -> StudyPlan:
    """Return the plan of a config.

    Args:
        loaded: The config.
        skip_data: Do not read the dataset; the plan then has runs and no figures.

    Raises:
        UsageError: When the runs contradict each other or the dataset cannot be used.
    """
    settings = loaded.experiment_set
    sweep = expand(settings, str(loaded.path))
    if skip_data:
        plan = make_plan(settings.experiment_set_id, sweep.runs, None, None, [])
        return StudyPlan(plan, None, (*loaded.warnings, *sweep.warnings))
    chosen = selected(loaded, sweep)
    uri = join_uri(settings.output_root, settings.experiment_set_id)
    notes = Outlook(uri, sweep.runs, chosen.rows, chosen.players).large_games()
    return StudyPlan(
        make_plan(settings.experiment_set_id, sweep.runs, chosen.rows, chosen.players, notes),
        standing(uri, sweep.runs, chosen.rows, chosen.players),
        (*loaded.warnings, *sweep.warnings, *chosen.warnings),
    )


def selected(loaded: LoadedConfig, sweep: Sweep) -> Selection:
    """Return the rows that a config selects, with warnings about special tokens in their texts.

    Raises:
        DatasetError: When the dataset cannot be used; the message names the config.
    """
    settings = loaded.experiment_set
    try:
        table = open_table(settings.dataset, loaded.path)
        selection = select_rows(
            table,
            settings.dataset,
            settings.selection,
            settings.modality,
            settings.shap.token_filter,
            other_filters={run.shap.token_filter for run in sweep.runs},
        )
        more = control_token_warnings(sweep.runs[0], loaded.path, table, selection.rows)
        return replace(selection, warnings=(*selection.warnings, *more))
    except DatasetError as error:
        raise DatasetError(f"{loaded.path}: {error}") from error
