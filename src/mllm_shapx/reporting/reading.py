"""A study read from its files. Nothing here writes, or needs the study to be running."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mllm_shapx.config.vocabulary import EXPLAINERS
from mllm_shapx.errors import StorageError, UsageError
from mllm_shapx.records.fields import MOST_ROW
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.run_reader import RunReader, find_runs
from mllm_shapx.records.spec import (
    explainer_type,
    is_of_older_runner,
    planned_rows,
    result_settings,
    stop_at,
)
from mllm_shapx.records.storage import Storage
from mllm_shapx.records.summary import AREAS

_ESTIMATOR_KEYS = frozenset(
    {"explainer_type", "budget", "hierarchical", "seed", "faithfulness", "interactions", "stop_when"}
)
"""Settings of the estimator, in which a run may differ from the exact run it is compared with."""


@dataclass(frozen=True)
class RunFiles:
    """One run's files."""

    records: RunReader

    @property
    def name(self) -> str:
        """The run's name."""
        return self.records.run_name

    @cached_property
    def spec(self) -> Mapping[str, Any]:
        """The content of `spec.json`, empty where it is missing or damaged."""
        return _unless_damaged(self.records.read_spec) or {}

    @cached_property
    def planned(self) -> frozenset[int] | None:
        """The rows that the run is to explain, None when its files do not say."""
        return _unless_damaged(lambda: planned_rows(dict(self.spec)))

    @cached_property
    def sample_rows(self) -> tuple[int, ...]:
        """The planned rows that have a sample, ascending; all rows where the plan is not known."""
        rows = self.records.sample_rows()
        return tuple(row for row in rows if self.planned is None or row in self.planned)

    @property
    def total(self) -> int | None:
        """How many rows the run is to explain, None when its files do not say."""
        if self.planned is not None:
            return len(self.planned)
        total = self.spec.get("rows_total")
        return total if type(total) is int and 0 <= total <= MOST_ROW else None

    @property
    def is_exact(self) -> bool:
        """Whether the run evaluates every coalition."""
        return (explainer_type(self.spec) or self.name) in {"exact", "exact_banzhaf"}

    @property
    def estimand(self) -> str:
        """What the values are: `shapley` or `banzhaf`."""
        facts = EXPLAINERS.get(explainer_type(self.spec) or self.name)
        return "shapley" if facts is None else facts.estimand

    @property
    def stop_at(self) -> float | None:
        """The standard error at which its sampling stops (`stop_when`), None where it does not."""
        return stop_at(result_settings(self.spec) or {})

    @property
    def share_sure(self) -> float | None:
        """The share of its samples whose standard errors are that small; None without `stop_when`."""
        sure, samples = self.summary.get("n_sure"), self.summary.get("n_samples")
        return None if sure is None or not samples else sure / samples

    @property
    def is_of_older_runner(self) -> bool:
        """Whether the older runner wrote it. Such a run has fewer figures and cannot be resumed."""
        return is_of_older_runner(self.spec)

    @cached_property
    def summary(self) -> Mapping[str, float]:
        """The numbers of `aggregate_metrics.json`; those that are missing or damaged are left out."""
        return _numbers(_unless_damaged(self.records.read_summary) or {})

    def sample(self, row_index: int) -> SampleResult | None:
        """Return a row's sample, None where it is missing or damaged."""
        try:
            return self.records.read_sample(row_index)
        except (FileNotFoundError, ValueError):
            return None

    @property
    def compared_settings(self) -> Mapping[str, Any]:
        """The settings that must be equal for one run to estimate the values of another."""
        settings = result_settings(self.spec) or {}
        return {key: value for key, value in settings.items() if key not in _ESTIMATOR_KEYS}

    def approximates(self, exact: "RunFiles") -> bool:
        """Return whether the run's values estimate those of `exact`: only the estimator may differ."""
        return (
            exact.is_exact
            and self.estimand == exact.estimand
            and self.compared_settings == exact.compared_settings
        )


@dataclass(frozen=True)
class StudyFiles:
    """An experiment set's directory, or one run of it."""

    storage: Storage
    runs: tuple[RunFiles, ...]

    @property
    def folder(self) -> str:
        """The name of the experiment set's directory."""
        return self.storage.uri.rstrip("/").rpartition("/")[2]

    def locate(self, path: str) -> str:
        """Return the full path or URI of a file below the experiment set."""
        return self.storage.locate(path)

    def exact_run_for(self, run: RunFiles) -> RunFiles | None:
        """Return the exact run whose values `run` estimates; itself for an exact one, None without one."""
        if run.is_exact:
            return run
        return next((other for other in self.runs if run.approximates(other)), None)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The rows that any run has a sample of, ascending."""
        return tuple(sorted({row for run in self.runs for row in run.sample_rows}))


def open_study(directory: str) -> StudyFiles:
    """Return the files of an experiment set's directory or of one run's.

    Raises:
        UsageError: When the directory is neither; the message names the files of a run.
    """
    try:
        storage, names = find_runs(directory)
    except StorageError as error:
        raise UsageError(f"{directory} cannot be read as a results directory: {error}") from error
    if not names:
        raise UsageError(
            f"{directory} holds no results: neither it nor a folder in it has a spec.json, a checkpoint.json "
            "or a folder samples. Give the directory of an experiment set (OUTPUT_ROOT/EXPERIMENT_SET_ID) or "
            "of one of its runs"
        )
    return StudyFiles(storage, tuple(RunFiles(RunReader(storage, name)) for name in _exact_first(names)))


def _unless_damaged[T](read: Callable[[], T | None]) -> T | None:
    try:
        return read()
    except ValueError:
        return None


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are numbers of a sensible size."""
    return {
        key: value
        for key, value in content.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and (-MOST_ROW if key in AREAS else 0) <= value <= MOST_ROW
    }


def _exact_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (name != "exact", name))
