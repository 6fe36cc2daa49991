"""Finds where an estimator's floor or the ceiling of 2^n coalitions replaces a run's budget."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import Budget, RunSpec, asked_coalitions, flat_coalitions

CEILING = "2^n"


def budget_bounds(run: RunSpec, rows: Iterable[int], players: Mapping[int, int] | None) -> dict[str, Any]:
    """Return the bounds of a run's budget and the number of rows that they change, as JSON data.

    `rows_raised` and `rows_cut` are null when the players are unknown before a row is read, and for a
    hierarchical run, whose games have few players. Its `floor` and `lower_floor` are those of its games.
    """
    floors = [EXPLAINERS[kind].floor for kind, _ in run.games]
    bounds: dict[str, Any] = {"floor": floors[0], "ceiling": CEILING}
    if run.hierarchical is not None:
        return {**bounds, "lower_floor": floors[1], "rows_raised": None, "rows_cut": None}
    counts = players_under(players, run.player_rule)
    if counts is None:
        return {**bounds, "rows_raised": None, "rows_cut": None}
    changes = [_change(run.explainer_type, run.budget, counts[row]) for row in rows if counts.get(row)]
    return {**bounds, "rows_raised": changes.count(1), "rows_cut": changes.count(-1)}


def bound_notes(runs: Sequence[RunSpec], rows: Sequence[int], players: Mapping[int, int] | None) -> list[str]:
    """Return sentences on budgets that a bound replaces; runs with the same bound share a sentence."""
    raised: defaultdict[str, list[str]] = defaultdict(list)
    cut: list[str] = []
    for run in runs:
        if run.hierarchical is not None:
            for kind, budget in run.games:
                if _change(kind, budget, run.hierarchical.k) == 1:
                    raised[EXPLAINERS[kind].floor].append(f"{run.name} (games of {kind})")
            continue
        bounds = budget_bounds(run, rows, players)
        if bounds["rows_raised"]:
            raised[bounds["floor"]].append(f"{run.name} ({bounds['rows_raised']:,} row(s))")
        if bounds["rows_cut"]:
            cut.append(f"{run.name} ({bounds['rows_cut']:,} row(s))")
    notes = [
        f"the budget is below the estimator's floor of {floor} coalitions for n players, which are evaluated "
        f"instead: {', '.join(dict.fromkeys(names))}"
        for floor, names in raised.items()
    ]
    if cut:
        notes.append(f"the budget is above the 2^n coalitions that there are: {', '.join(cut)}")
    return notes


def _change(explainer_type: str, budget: Budget, num_players: int) -> int:
    """Return 1 where the floor applies, -1 where the ceiling does, 0 where the budget decides."""
    if not EXPLAINERS[explainer_type].takes_budget or budget.kind == "all":
        return 0
    if budget.kind == "num_samples" and budget.value == -1:
        return 0
    wanted = budget.evaluations(num_players)
    if wanted is not None and wanted > 1 << num_players:
        return -1
    planned = flat_coalitions(explainer_type, budget, num_players)
    return 1 if planned > asked_coalitions(budget, num_players) else 0
