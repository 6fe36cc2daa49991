"""A study's stored coalitions with their values and answers as one CSV or Parquet file (`store export`)."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_shapx.config.loading import load_config
from mllm_shapx.data.sources import Table
from mllm_shapx.errors import OutputError, RowError
from mllm_shapx.execution.answers import (
    AnswerFiles,
    NotStoredError,
    refuse_likelihoods,
    stored_files,
    stored_row,
    vector_kind,
)
from mllm_shapx.execution.dataset import open_study_table
from mllm_shapx.execution.messages import Study
from mllm_shapx.execution.options import RunOptions
from mllm_shapx.execution.preparation import prepare, study_config
from mllm_shapx.explaining.forcing import Forcer
from mllm_shapx.explaining.unit import RowExplainer
from mllm_shapx.explaining.values import Sources, build_value
from mllm_shapx.models.base import Answer
from mllm_shapx.planning.runs import RunSpec, settings_digest
from mllm_shapx.planning.units import WorkUnit, plan_units
from mllm_shapx.records.runs import find_runs
from mllm_shapx.records.storage import open_storage
from mllm_shapx.reporting.export import encodable
from mllm_shapx.reporting.output import TableForm, new_output, table_file

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("row", "generation_key", "num_players", "coalition", "answer")
"""Columns of the file, before one for each value function."""
_AT_ONCE = 50_000
"""Lines that are held in memory, beside those of one row."""

type Line = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class StoreExported:
    """The file that `store export` wrote."""

    path: Path
    rows: int
    lines: int
    columns: tuple[str, ...]
    """One for each value function."""
    changed: int
    """Rows that are left out, because they have changed since they were answered."""
    damaged: int
    """Files that are left out, because they cannot be read or do not fit."""

    def to_text(self) -> str:
        """Return what was written, and what was left out."""
        text = (
            f"{self.path}: {self.lines:,} line(s), for each stored coalition of {self.rows:,} row(s), with "
            f"values under {', '.join(self.columns)}"
        )
        if self.changed:
            text += (
                f"\n{self.changed:,} row(s) are left out: their text or their players have changed in the "
                "dataset since they were answered"
            )
        if self.damaged:
            text += f"\n{self.damaged:,} file(s) cannot be read and are left out; `store info` names them"
        return text


def export_store(
    directory: str, form: TableForm, output: Path | None = None, *, overwrite: bool = False
) -> StoreExported:
    """Write a line for each stored coalition of each row; no model is asked, and the study is left as it is.

    Args:
        directory: An experiment set's directory, or one run's, whose value function is then the only one.
        form: `csv` (UTF-8, one header line, empty cells for what is not known) or `parquet`.
        output: The file; `SET_coalitions.FORM` in the working directory when None.
        overwrite: Replace a file that is there.

    Raises:
        UsageError: When nothing is stored, or the file is there or is in that directory.
        StorageError: When the file cannot be written.
    """
    config = study_config(directory)
    study, _ = prepare(load_config(config), RunOptions(resume=True), may_do_without_server=True)
    storage = open_storage(str(config.parent))
    output = new_output(storage, output, f"{study.experiment_set_id}_coalitions.{form}", overwrite=overwrite)
    names = set(find_runs(directory)[1])
    runs = tuple(run for run in study.runs if run.name in names)
    if not runs:
        raise OutputError(
            f"{directory}: {config} names none of its runs, so that their settings are not known"
        )
    files = stored_files(storage, runs, study.model_commit, reads_only=True)
    if files is None:
        raise OutputError(
            f"{directory} holds no answers of its runs by this model and these generation settings; "
            f"`mllm-shapx store info {directory}` says what is stored"
        )
    units = files.held(plan_units(runs, study.rows, study.players, {}))
    units.sort(key=lambda unit: (unit.row_index, unit.generation_key))
    exporter = _Exporter(study, runs, files, open_study_table(study))
    columns = exporter.columns
    with table_file(output, form, _frame((), columns)) as write:
        for some in batched(exporter.lines(units), _AT_ONCE):
            write(_frame(some, columns))
    return StoreExported(
        output, len(exporter.rows), exporter.count, columns, len(exporter.changed), exporter.damaged
    )


def _frame(lines: Sequence[Line], columns: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    types = {"row": "int64", "num_players": "int64", **dict.fromkeys(columns, "float64")}
    return pd.DataFrame.from_records(list(lines), columns=[*COLUMNS, *columns]).astype(types)


def value_columns(runs: Sequence[RunSpec]) -> dict[str, str]:
    """Return the digest of each way to score that runs have -> its column.

    The column is named after the value function or similarity. Several ways with the same name, which differ
    in options or vectors, also have the name of their first run.
    """
    first = _first_of_each(runs)
    names = [_name(run) for run in first.values()]
    return {
        digest: _name(run) if names.count(_name(run)) == 1 else f"{_name(run)} ({run.name})"
        for digest, run in first.items()
    }


def _first_of_each(runs: Iterable[RunSpec]) -> dict[str, RunSpec]:
    """Return the digest of each way to score -> the first run that has it."""
    first: dict[str, RunSpec] = {}
    for run in runs:
        first.setdefault(_scoring(run), run)
    return first


def _name(run: RunSpec) -> str:
    return run.shap.value_function or run.shap.similarity


def _scoring(run: RunSpec) -> str:
    """Return a digest of all that decides a coalition's value, given the answers."""
    vectors = (run.shap.mode, run.shap.reducer) if run.shap.needs_embeddings else None
    encoder = None if run.embedding is None else run.result_settings["embedding"]
    return settings_digest(
        {"name": _name(run), "options": run.shap.value_options, "vectors": vectors, "encoder": encoder}
    )


class _Exporter:
    """Makes the lines, row by row, and counts them."""

    def __init__(self, study: Study, runs: Sequence[RunSpec], files: AnswerFiles, table: Table) -> None:
        self._study = study
        self._runs = {run.name: run for run in runs}
        self._files = files
        self._table = table
        self._column_of = value_columns(runs)
        self.rows: set[int] = set()
        self.changed: set[int] = set()
        self.count = self.damaged = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of values."""
        return tuple(self._column_of.values())

    def lines(self, units: Sequence[WorkUnit]) -> Iterator[Line]:
        """Yield the lines of all units, by row, generation key and coalition."""
        with asyncio.Runner() as runner:
            for unit in units:
                for line in runner.run(self._of_unit(unit)):
                    self.count += 1
                    yield line

    async def _of_unit(self, unit: WorkUnit) -> list[Line]:
        runs = _first_of_each(self._runs[name] for name in unit.run_names)
        run = self._runs[unit.run_names[0]]
        stored, notes = self._files.read(unit)
        self.damaged += len(notes)
        row = stored_row(self._table, unit.row_index, run, stored)
        if row is None:
            self.changed.add(unit.row_index)
            return []
        masks = sorted({*stored.by_mask, *(mask for _, mask in stored.likelihoods)})
        values = {
            column: await self._values(unit, row, runs[digest], masks) if digest in runs else {}
            for digest, column in self._column_of.items()
        }
        if masks:
            self.rows.add(unit.row_index)
        place = (unit.row_index, unit.generation_key, row.num_players)
        return [
            (*place, f"{mask:#x}", _text(stored.by_mask.get(mask)), *(of.get(mask) for of in values.values()))
            for mask in masks
        ]

    async def _values(
        self, unit: WorkUnit, row: RowExplainer, run: RunSpec, masks: Sequence[int]
    ) -> Mapping[int, float]:
        """Return the values of those coalitions for which everything is stored."""
        everyone = (1 << row.num_players) - 1
        value = await asyncio.to_thread(build_value, run, self._sources(unit, row, run))
        while everyone in masks:
            try:
                return dict(zip(masks, await value.payoffs(everyone, masks), strict=True))
            except NotStoredError as missing:
                if missing.masks.isdisjoint(masks):
                    break
                masks = [mask for mask in masks if mask not in missing.masks]
            except RowError:
                break
        return {}

    def _sources(self, unit: WorkUnit, row: RowExplainer, run: RunSpec) -> Sources:
        answers = row.coalitions.stored
        kind = vector_kind(run, self._study.encoder_commit(run))
        forcer = Forcer(row.coalitions, run.name, refuse_likelihoods)

        async def ask(masks: Sequence[int]) -> list[Answer]:
            if missing := [mask for mask in masks if mask not in answers]:
                raise NotStoredError("coalition(s)", missing)
            found = [answers[mask] for mask in masks]
            if run.shap.reads == "log_probabilities":
                found = await forcer.with_logprobs(masks, found)
            return found

        return Sources(ask, self._files.embedder(unit, kind, answers), forcer.force)


def _text(answer: Answer | None) -> str | None:
    return None if answer is None else encodable(answer.text)
