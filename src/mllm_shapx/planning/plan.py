"""The plan: counts a sweep's model calls before anything is loaded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.planning.bounds import bound_notes, budget_bounds
from mllm_shapx.planning.hopeless import hopeless_runs, without_players
from mllm_shapx.planning.players import players_under
from mllm_shapx.planning.runs import Budget, HierarchicalSpec, RunSpec, blocks_in_words
from mllm_shapx.planning.units import expected_answers, explaining_order, runs_by_key

_HEADINGS = {
    "samples": "samples",
    "refused_samples": "will fail",
    "coalitions": "coalitions",
    "model_calls": "model calls",
}
"""Figure of a run -> its column heading."""
_BUDGET_KINDS = ("num_samples", "fraction", "linear")


@dataclass(frozen=True)
class Work:
    """A run's totals over all rows."""

    coalitions: int
    """Coalitions evaluated: the model calls of the run alone."""
    model_calls: float
    """Answers that no earlier run needs; exact runs come first, then runs by falling coalitions."""
    refused_rows: int
    """Rows without players, or with too many for a game of 2^24 coalitions; not counted, and they fail."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.coalitions + other.coalitions,
            self.model_calls + other.model_calls,
            self.refused_rows + other.refused_rows,
        )


@dataclass(frozen=True)
class RunPlan:
    """One run of the plan."""

    run: RunSpec
    work: Work | None
    """None when the players per row are unknown."""


@dataclass(frozen=True)
class Plan:
    """The plan of an experiment set."""

    experiment_set_id: str
    runs: tuple[RunPlan, ...]
    rows: tuple[int, ...] | None
    """Row indices in selection order, None when the dataset was not read."""
    players: Mapping[int, int] | None
    """Players per row, None when they are unknown before a row is read."""
    is_estimate: bool
    """Whether model calls after sharing are expectations, not counts."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data: runs, rows and totals; null for unknown figures."""
        return {
            "experiment_set_id": self.experiment_set_id,
            "runs": [self._run_json(item) for item in self.runs],
            "rows": None if self.rows is None else [self._row_json(row) for row in self.rows],
            "totals": self.totals(),
            "notes": list(self.notes),
        }

    def totals(self) -> dict[str, Any]:
        """Return the totals over all runs; null for unknown figures."""
        work = [item.work for item in self.runs if item.work is not None]
        known = len(work) == len(self.runs)
        coalitions = sum(item.coalitions for item in work)
        calls = round(sum(item.model_calls for item in work))
        return {
            "runs": len(self.runs),
            "rows": None if self.rows is None else len(self.rows),
            "samples": None if self.rows is None else len(self.rows) * len(self.runs),
            "coalitions": coalitions if known else None,
            "model_calls_without_sharing": coalitions if known else None,
            "model_calls": calls if known else None,
            "model_calls_are_an_estimate": self.is_estimate,
            "sharing_factor": coalitions / calls if known and calls else None,
            "refused_samples": sum(item.refused_rows for item in work) if known else None,
        }

    def to_text(self) -> str:
        """Return the plan as a readable table."""
        totals = self.totals()
        keys = ["samples", "coalitions", "model_calls"]
        if totals["refused_samples"]:
            keys.insert(1, "refused_samples")
        table: list[tuple[str, ...]] = [("run", "explainer", "budget", *map(_HEADINGS.__getitem__, keys))]
        table += [self._run_cells(item, keys) for item in self.runs]
        table.append(("all", "", "", *(_figure(totals[key]) for key in keys)))
        lines = [
            f"{self.experiment_set_id}: {len(self.runs)} run(s), {self._rows_text()}",
            "",
            *_aligned(table),
        ]
        factor = totals["sharing_factor"]
        if factor is not None and factor > 1.0:
            about = "about " if self.is_estimate else ""
            lines += ["", f"Sharing answers between runs: {about}{factor:.2f} coalitions per model call."]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _rows_text(self) -> str:
        if self.rows is None:
            return "rows not looked at"
        if not self.players:
            return f"{len(self.rows):,} row(s), players known once a row is read"
        counts = [self.players[row] for row in self.rows]
        return (
            f"{len(self.rows):,} row(s) of {min(counts)} to {max(counts)} players (median {median(counts):g})"
        )

    def _run_cells(self, item: RunPlan, keys: Sequence[str]) -> tuple[str, ...]:
        figures = self._run_json(item)
        words = (item.run.name, item.run.explainer_type, _budget_text(item.run))
        return (*words, *(_figure(figures[key]) for key in keys))

    def _run_json(self, item: RunPlan) -> dict[str, Any]:
        run, work = item.run, item.work
        return {
            "name": run.name,
            "explainer_type": run.explainer_type,
            "budget": _budget_json(run.budget),
            **{kind: run.budget.value if run.budget.kind == kind else None for kind in _BUDGET_KINDS},
            "hierarchical": None if run.hierarchical is None else _hierarchical_json(run.hierarchical),
            "budget_bounds": budget_bounds(run, self.rows or (), self.players),
            **blocks_in_words(stop_when=run.stop_when),
            "seed": run.seed,
            "generation_key": run.generation_key,
            "samples": None if self.rows is None else len(self.rows),
            "refused_samples": None if work is None else work.refused_rows,
            "coalitions": None if work is None else work.coalitions,
            "model_calls": None if work is None else round(work.model_calls),
        }

    def _row_json(self, row: int) -> dict[str, Any]:
        return {"row_index": row, "num_players": None if self.players is None else self.players[row]}


def make_plan(
    experiment_set_id: str,
    runs: Sequence[RunSpec],
    rows: Sequence[int] | None,
    players: Mapping[int, int] | None,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the plan of `runs` on `rows`.

    `rows` is None when the dataset was not read; `players` is None when they are unknown before a row is
    read. Model calls after sharing are exact if every game runs alone or beside one that needs all
    coalitions, else estimated (`planning.coverage`). Answers stored by earlier work reduce them further and
    are unknown here.
    """
    notes = [*notes, *_notes(runs)]
    if rows is None or players is None:
        items = tuple(RunPlan(run, None) for run in runs)
        return Plan(
            experiment_set_id, items, None if rows is None else tuple(rows), None, False, tuple(notes)
        )
    work = {run.name: Work(0, 0.0, 0) for run in runs}
    is_estimate = False
    for sharing in runs_by_key(runs).values():
        of_rows = players_under(players, sharing[0].player_rule) or {}
        counts = Counter(of_rows[row] for row in rows)
        for num_players, number in sorted(counts.items()):
            is_estimate |= _is_estimate(sharing, num_players)
            for name, asked in _work(sharing, num_players, number).items():
                work[name] += asked
    notes += without_players(rows, players)
    notes += [each.to_text() for each in hopeless_runs(runs, rows, players)]
    notes += bound_notes(runs, rows, players)
    items = tuple(RunPlan(run, work[run.name]) for run in runs)
    return Plan(experiment_set_id, items, tuple(rows), players, is_estimate, tuple(notes))


def _work(sharing: Sequence[RunSpec], num_players: int, number: int) -> dict[str, Work]:
    """Return run -> its work on `number` rows of `num_players`, for runs of one generation key."""
    work = {run.name: Work(0, 0.0, number) for run in sharing}
    if num_players == 0:
        return work
    possible = [run for run in sharing if not run.is_hopeless(num_players)]
    before, asked = 0.0, []
    for run in explaining_order(possible, num_players):
        asked.append(run)
        together = max(before, expected_answers(asked, num_players))
        work[run.name] = Work(number * run.coalitions(num_players), number * (together - before), 0)
        before = together
    return work


def _is_estimate(sharing: Sequence[RunSpec], num_players: int) -> bool:
    possible = [run for run in sharing if not run.is_hopeless(num_players)]
    flat = [run for run in possible if run.hierarchical is None and run.stop_when is None]
    if any(run.game_coalitions(num_players) >= 1 << num_players for run in flat):
        return False
    bounded = any(run.hierarchical or run.stop_when or run.faithfulness for run in possible)
    return len(possible) > 1 or bounded


def _notes(runs: Sequence[RunSpec]) -> Iterator[str]:
    if stopping := sum(run.stop_when is not None for run in runs):
        yield f"{stopping} run(s) may stop early on a row (stop_when): their figures are upper bounds"
    if measured := sum(run.faithfulness is not None for run in runs):
        yield f"coalitions of {measured} run(s) include those of their faithfulness curves, at most"
    alone = [run for run in runs if not run.shares_answers]
    if alone and len(runs) > 1:
        temperature = f"text_temperature {alone[0].generation.text_temperature:g}"
        yield (
            f"{len(alone)} run(s) share no answers, because they are sampled ({temperature}): "
            "set it to 0, or generation.reuse_sampled_answers to true"
        )


def _budget_json(budget: Budget) -> dict[str, Any]:
    return {"kind": budget.kind, "value": None if budget.kind == "all" else budget.value}


def _hierarchical_json(spec: HierarchicalSpec) -> dict[str, Any]:
    budgets = {key: _budget_json(getattr(spec, key)) for key in ("inner_budget", "first_layer_budget")}
    return {**asdict(spec), **budgets}


def _budget_text(run: RunSpec) -> str:
    spec = run.hierarchical
    if spec is None:
        facts = EXPLAINERS[run.explainer_type]
        most = "" if run.stop_when is None else "at most "
        return most + _amount(run.budget) if facts.takes_budget or facts.floor == "2^n" else facts.floor
    first, inner = _amount(spec.first_layer_budget), _amount(spec.inner_budget)
    return f"k {spec.k}, first {first}, lower {inner}"


def _amount(budget: Budget) -> str:
    if budget.kind == "all":
        return "all"
    if budget.kind == "num_samples":
        return "floor" if budget.value == -1 else f"{int(budget.value):,}"
    return f"{budget.value:g} of 2^n" if budget.kind == "fraction" else f"{budget.value:g} n^2"


def _figure(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the table as lines with aligned columns: words left, figures right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    words = 3
    return [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
