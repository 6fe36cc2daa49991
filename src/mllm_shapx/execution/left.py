"""What is left to do of a study, from what was found in its directory."""

from collections.abc import Collection, Mapping

from mllm_shapx.execution.messages import Study
from mllm_shapx.planning.units import WorkUnit, plan_units


def units_left(
    study: Study, completed: Mapping[str, Collection[int]], failed: Mapping[str, Collection[int]]
) -> list[WorkUnit]:
    """Return the units that need work: rows that are neither done nor given up; for `retry`, its rows alone.

    Args:
        study: What is studied.
        completed: Run -> rows with a sample.
        failed: Run -> quarantined rows.
    """
    retried = {run.name: set((study.retry_rows or {}).get(run.name, ())) for run in study.runs}
    settled = {name: {*completed[name], *(set(failed[name]) - rows)} for name, rows in retried.items()}
    units = plan_units(study.runs, study.rows, study.players, settled)
    if study.retry_rows is None:
        return units
    return [unit for unit in units if any(unit.row_index in retried[name] for name in unit.run_names)]
