"""Checks a directory of results: every file is readable, none is missing, and the numbers add up."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mllm_shapx.records.lock import lock_holder
from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.spec import is_of_older_runner, planned_rows
from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.records.summary import N_CONSTANT, OLDER_KEYS, RunSummary
from mllm_shapx.reporting.axioms import ValueCheck, value_checks
from mllm_shapx.reporting.changed_rows import MadeFrom, compare_with_dataset, mixed_rows
from mllm_shapx.reporting.reading import StudyFiles, open_study

_SHOWN_ROWS = 5
_LARGEST = 1e300
"""Larger numbers of a damaged file cannot be computed with."""
_GO_ON = "`mllm-shapx run --config CONFIG --resume` does again what is missing or damaged, --overwrite all"

_NO_SPEC = "it is missing, so that counts cannot be held against the plan"


@dataclass(frozen=True, slots=True)
class VerifyProblem:
    """One thing that is wrong."""

    file: str
    """Full path or URI of the file or folder."""
    message: str
    """What is wrong with it, in words."""

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass(frozen=True, slots=True)
class VerifiedRun:
    """The counts of one run."""

    directory: str
    planned: int | None
    """Rows that its spec plans, None when it does not say."""
    completed: int
    """Readable samples."""
    failed: int
    """Quarantined rows."""


@dataclass(slots=True)
class VerifyReport:
    """The outcome of `verify`."""

    runs: list[VerifiedRun] = field(default_factory=list)
    problems: list[VerifyProblem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Findings that a sound study may have, and that may also be the sign of a broken model."""
    notes: list[str] = field(default_factory=list)
    """What the reader should know; these are not faults."""

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """Return the report as lines for the terminal."""
        lines = [str(problem) for problem in self.problems]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"note: {note}" for note in self.notes]
        samples = sum(run.completed for run in self.runs)
        failed = sum(run.failed for run in self.runs)
        verdict = "all sound" if self.ok else f"{len(self.problems)} problem(s)"
        if self.warnings:
            verdict += f", {len(self.warnings)} warning(s)"
        if not self.ok:
            verdict += f"; {_GO_ON}"
        lines.append(f"{len(self.runs)} run(s), {samples} sample(s), {failed} quarantined row(s): {verdict}")
        return "\n".join(lines)


def verify(directories: Sequence[str]) -> VerifyReport:
    """Check experiment sets' or runs' directories; nothing is changed.

    Raises:
        UsageError: When a directory holds no results.
        StorageError: When a directory cannot be read.
    """
    report = VerifyReport()
    for directory in directories:
        study = open_study(directory)
        holder = lock_holder(study.storage)
        if holder is not None:
            report.notes.append(
                f"{study.storage.uri} is being written by {holder}; verify it again when that is done"
            )
        made_from = {run.name: _RunCheck(run.records, report).check() for run in study.runs}
        _check_content(study, made_from, report)
        for path, message in CoalitionStore(study.storage).problems():
            fix = "a run that needs it moves it aside, else remove it by hand"
            report.problems.append(VerifyProblem(study.locate(path), f"{message}; {fix}"))
    return report


class _RunCheck:
    """The checks of one run, which add to a report."""

    def __init__(self, records: RunReader, report: VerifyReport) -> None:
        self._records = records
        self._storage = records.storage
        self._layout = records.layout
        self._directory = records.storage.locate(records.run_name)
        self._report = report
        self._made_from: dict[int, str] = {}

    def check(self) -> MadeFrom:
        """Check everything; return what each row's sample was made from."""
        spec = self._read(self._layout.spec, self._records.read_spec, _NO_SPEC) or {}
        planned = self._planned(spec)
        summary = RunSummary()
        completed = self._samples(value_checks(spec), summary)
        failed = self._failures(completed)
        for _ in failed:
            summary.add_failure()
        if planned is not None:
            missing = planned - completed - failed
            self._rows(self._layout.samples, missing, "planned row(s) have neither a sample nor a failure")
        self._checkpoint(completed, failed, planned)
        self._summary(summary, spec)
        for path in self._records.temp_files():
            self._add(path, "it is left over from a write that was cut short")
        total = None if planned is None else len(planned)
        self._report.runs.append(VerifiedRun(self._directory, total, len(completed), len(failed)))
        return self._made_from

    def _add(self, path: str, message: str) -> None:
        self._report.problems.append(VerifyProblem(self._storage.locate(path), message))

    def _rows(self, path: str, rows: frozenset[int], what: str) -> None:
        """Add one problem for all the rows of a kind."""
        if not rows:
            return
        shown = ", ".join(str(row) for row in sorted(rows)[:_SHOWN_ROWS])
        more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
        self._add(path, f"{len(rows)} {what}: row {shown}{more}")

    def _read[T](self, path: str, read: Callable[[], T | None], missing: str = "it is missing") -> T | None:
        """Return a file's content; None, and a problem, when it is missing or damaged."""
        try:
            found = read()
        except ValueError as error:
            self._add(path, str(error))
            return None
        if found is None:
            self._add(path, missing)
        return found

    def _planned(self, spec: dict[str, Any]) -> frozenset[int] | None:
        try:
            planned = planned_rows(spec)
        except ValueError as error:
            self._add(self._layout.spec, str(error))
            return None
        if is_of_older_runner(spec):
            self._report.notes.append(
                f"{self._directory} was written by the older runner, which does not record which rows were "
                "selected: counts were not held against a plan"
            )
        elif planned is None and spec:
            self._add(self._layout.spec, "it does not say which rows were selected")
        return planned

    def _samples(self, checks: Sequence[ValueCheck], summary: RunSummary) -> frozenset[int]:
        rows = self._records.sample_paths()
        for path, content in self._storage.read_many(list(rows)):
            if isinstance(content, OSError):
                self._add(path, f"it cannot be read ({content.strerror or content})")
                continue
            try:
                sample = self._records.decode_sample(rows[path], content)
            except ValueError as error:
                self._add(path, str(error))
                continue
            self._made_from[sample.row_index] = sample.made_from
            summary.add(sample)
            for check in checks:
                for message in check(sample):
                    self._add(path, message)
        return frozenset(self._made_from)

    def _failures(self, completed: frozenset[int]) -> frozenset[int]:
        failed = set()
        for path, row, failure in self._records.failure_files():
            if isinstance(failure, Exception):
                self._add(path, "it is damaged: no failure can be read from it")
            elif row in completed:
                self._add(path, "the row has a sample as well")
            elif failure.quarantined:
                failed.add(row)
        return frozenset(failed)

    def _checkpoint(
        self, completed: frozenset[int], failed: frozenset[int], planned: frozenset[int] | None
    ) -> None:
        path = self._layout.checkpoint
        checkpoint = self._read(path, self._records.read_checkpoint)
        if checkpoint is None:
            return
        named, named_failed = frozenset(checkpoint.completed_indices), frozenset(checkpoint.failed_indices)
        if len(named) != len(checkpoint.completed_indices):
            self._add(path, "it names completed rows more than once")
        self._rows(path, named - completed, "row(s) named as completed have no readable sample")
        self._rows(path, completed - named, "sample(s) are not named")
        self._rows(path, named_failed - failed, "row(s) named as failed have no failure file")
        self._rows(path, failed - named_failed, "failed row(s) are not named")
        if planned is None:
            return
        is_done, next_index = planned <= completed, checkpoint.next_index
        if not 0 <= next_index <= len(planned) or is_done != (next_index == len(planned)):
            state = "all" if is_done else "not all"
            self._add(
                path, f"next_index is {next_index}, though {state} of {len(planned)} rows are completed"
            )

    def _summary(self, summary: RunSummary, spec: dict[str, Any]) -> None:
        if summary.n_constant:
            self._report.warnings.append(
                f"{self._directory}: in {summary.n_constant} of {summary.n_samples} sample(s) every "
                "coalition has the same answer, so that the values are equal and say nothing of the words"
            )
        found = self._read(self._layout.summary, self._records.read_summary)
        if found is None:
            return
        expected = summary.to_json()
        if N_CONSTANT not in found:
            del expected[N_CONSTANT]  # written by an earlier version
        if is_of_older_runner(spec):
            expected = {key: expected[key] for key in OLDER_KEYS}
        if different := _differing(found, expected):
            what = f"it differs from what the samples give: {', '.join(different)}"
            self._add(self._layout.summary, what)


def _check_content(study: StudyFiles, made_from: Mapping[str, MadeFrom], report: VerifyReport) -> None:
    """Add samples whose rows differ from the dataset's or from the other runs'."""
    place = study.storage.uri
    changes, notes = compare_with_dataset([(run, made_from[run.name]) for run in study.runs])
    fix = "put the dataset back, or let `run --resume --accept-changed-rows` explain these rows again"
    report.problems += [VerifyProblem(place, f"{found}; {fix}") for found in changes]
    report.notes += [f"{place}: {note}" for note in notes]
    if mixed := mixed_rows(made_from):
        rows = ", ".join(map(str, mixed[:_SHOWN_ROWS]))
        message = (
            f"{len(mixed)} row(s) were explained from other content in some runs than in others: row {rows}"
        )
        report.problems.append(VerifyProblem(place, message))


def _differing(found: Any, expected: Any, prefix: str = "") -> list[str]:
    """Return the keys of `expected` with another value in `found`, which may have more keys."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return [prefix or "not a JSON object"]
        return [
            key
            for name, value in expected.items()
            for key in _differing(found.get(name), value, f"{prefix}.{name}" if prefix else name)
        ]
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return [prefix]
        return [
            key
            for index, (one, other) in enumerate(zip(found, expected, strict=True))
            for key in _differing(one, other, f"{prefix}[{index}]")
        ]
    if isinstance(expected, float) and isinstance(found, int | float):
        is_close = abs(found) < _LARGEST and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
        return [] if is_close else [prefix]
    return [] if found == expected else [prefix]
