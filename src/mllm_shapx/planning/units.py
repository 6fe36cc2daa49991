"""Work units: a row and the unfinished runs of one generation key, and the order of units."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mllm_shapx.planning.coverage import Drawn, distinct, drawn
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import RunSpec

NOMINAL_PLAYERS = 10
"""Assumed players of a row with unknown players (a spoken prompt)."""
SCOUTED_AT = 0.04
"""Share of the expected answers after which the second scouts follow."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One row explained by several runs that share the model's answers."""

    unit_id: str
    row_index: int
    """Index in the source dataset."""
    position: int
    """Place in selection order."""
    generation_key: str
    cost_key: str
    """For equal numbers of players, an answer costs the same in units of one cost key."""
    run_names: tuple[str, ...]
    """Exact runs first, then by falling coalitions, so that later runs reuse stored answers."""
    cost: float
    """Expected model calls; refused runs (too many coalitions) cost nothing."""


def plan_units(
    runs: Sequence[RunSpec],
    rows: Sequence[int],
    players: Mapping[int, int] | None,
    done: Mapping[str, Collection[int]],
) -> list[WorkUnit]:
    """Return the unfinished units, longest first, except for two early scouts of each cost key.

    Args:
        runs: The sweep.
        rows: Row indices in selection order, each once.
        players: Players per row; None or without a row where unknown.
        done: Run name -> finished row indices.

    An answer's cost depends on its key: settings that generate more tokens cost more. With the longest units
    first, keys of shorter games are measured late, and the estimated remaining time is wrong until then. So
    one unit of medium cost of each other key (a scout) follows the longest unit, and another one follows
    after 4% of the work.

    The order is deterministic: by cost, then selection order, then generation key.
    """
    finished = {name: frozenset(indices) for name, indices in done.items()}
    known: dict[tuple[tuple[str, ...], int], tuple[tuple[str, ...], float]] = {}
    units = []
    for key, sharing in runs_by_key(runs).items():
        counts = players_under(players, sharing[0].player_rule) or {}
        for position, row_index in enumerate(rows):
            needed = tuple(run for run in sharing if row_index not in finished.get(run.name, ()))
            if not needed:
                continue
            # There are few sets of runs and numbers of players.
            case = tuple(run.name for run in needed), counts.get(row_index, NOMINAL_PLAYERS)
            if case not in known:
                known[case] = _order_and_cost(needed, case[1])
            names, cost = known[case]
            unit_id = f"{row_index:05d}-{key}"
            units.append(WorkUnit(unit_id, row_index, position, key, sharing[0].cost_key, names, cost))
    return _with_scouts(sorted(units, key=lambda unit: (-unit.cost, unit.position, unit.generation_key)))


def _order_and_cost(runs: Sequence[RunSpec], num_players: int) -> tuple[tuple[str, ...], float]:
    possible = [run for run in runs if not run.is_hopeless(num_players)]
    names = tuple(run.name for run in explaining_order(runs, num_players))
    return names, expected_answers(possible, num_players)


def _with_scouts(units: list[WorkUnit]) -> list[WorkUnit]:
    """Return `units`, longest first, with scouts of all keys except that of the longest unit."""
    by_key: dict[str, list[WorkUnit]] = {}
    for unit in units:
        by_key.setdefault(unit.cost_key, []).append(unit)
    others = [of_key for key, of_key in by_key.items() if key != units[0].cost_key]
    if not others:
        return units
    # The first scouts run on cold devices; the second ones are more accurate.
    scouts = [[of_key[place * len(of_key) // 3] for of_key in others] for place in (1, 2)]
    sent = {unit.unit_id for side_by_side in scouts for unit in side_by_side}
    first, *rest = [unit for unit in units if unit.unit_id not in sent]
    share, done, place = SCOUTED_AT * sum(unit.cost for unit in units), first.cost, 0
    while place < len(rest) and done < share:
        done += rest[place].cost
        place += 1
    order = (first, *scouts[0], *rest[:place], *scouts[1], *rest[place:])
    return list({unit.unit_id: unit for unit in order}.values())


def runs_by_key(runs: Sequence[RunSpec]) -> dict[str, list[RunSpec]]:
    """Return generation key -> the runs that share its answers, both in the order of the sweep."""
    grouped: dict[str, list[RunSpec]] = {}
    for run in runs:
        grouped.setdefault(run.generation_key, []).append(run)
    return grouped


def explaining_order(runs: Sequence[RunSpec], num_players: int) -> list[RunSpec]:
    """Return `runs` with exact ones first, then by falling coalitions.

    Among equal runs, one that reads log-probabilities comes first, so that answers are generated with them.
    """

    def place(run: RunSpec) -> tuple[bool, int, bool]:
        reads_logprobs = run.shap.reads == "log_probabilities"
        return run.explainer_type != "exact", -run.coalitions(num_players), not reads_logprobs

    return sorted(runs, key=place)


def expected_answers(runs: Sequence[RunSpec], num_players: int) -> float:
    """Return the expected model calls of `runs` of one generation key together.

    A call is an answer to one coalition, or the likelihood of one given text after its prompt. Runs that read
    likelihoods need one answer, for the grand coalition.
    """
    forced: dict[str, list[RunSpec]] = {}
    for run in runs:
        for text in run.forced_texts:
            forced.setdefault(text, []).append(run)
    answering = [run for run in runs if not run.forced_texts]
    answers = _expected_union(answering, num_players) or min(1.0, len(runs))
    return answers + sum(_expected_union(sharing, num_players) for sharing in forced.values())


def _expected_union(runs: Sequence[RunSpec], num_players: int) -> float:
    """Return the expected number of distinct coalitions of `runs` together.

    2^n when a run needs all, infinity when a float overflows. Exact for one run; for several sampling runs,
    one draw of their samplers (`planning.coverage`). Without players, 1 for the empty prompt.
    """
    if not runs:
        return 0.0
    if num_players == 0:
        return 1.0
    counts = [run.coalitions(num_players) for run in runs]
    most = max(counts)
    if max(run.game_coalitions(num_players) for run in runs) >= 1 << num_players:
        return _as_float(1 << num_players)
    if len(runs) == 1:
        return _as_float(most)
    sets = [_drawn(run, num_players) for run in runs]
    return min(max(distinct(sets, num_players), _as_float(most)), _as_float(sum(counts)))


def _drawn(run: RunSpec, num_players: int) -> Drawn:
    if run.hierarchical is not None:
        return Drawn(frozenset(), run.coalitions(num_players))
    evaluations = run.game_coalitions(num_players)
    of_game = drawn(run.explainer_type, evaluations, num_players, run.seed_for(0))
    # Curves of two runs share few coalitions, because their orders differ.
    return Drawn(of_game.masks, of_game.rest + run.coalitions(num_players) - evaluations)


def _as_float(count: int) -> float:
    try:
        return float(count)
    except OverflowError:
        return math.inf
