"""Checks a directory of results: every file is readable, none is missing, and the numbers add up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shapx.records.lock import lock_holder
from mllm_shapx.records.run_reader import RunReader
from mllm_shapx.records.spec import is_of_older_runner, planned_rows
from mllm_shapx.records.storage import Storage
from mllm_shapx.records.store import CoalitionStore
from mllm_shapx.records.summary import N_CONSTANT, OLDER_KEYS, RunSummary
from mllm_shapx.reporting.axioms import ValueCheck, value_checks
from mllm_shapx.reporting.changed_rows import MadeFrom, compare_with_dataset, mixed_rows
from mllm_shapx.reporting.differing import different_keys
from mllm_shapx.reporting.reading import StudyFiles, open_study

_SHOWN_ROWS = 5


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
    """What was found of one run."""

    directory: str
    planned: int | None
    """Rows that its spec plans, None when it does not say."""
    completed: int
    """Readable samples."""
    failed: int
    """Quarantined rows."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of `verify`."""

    runs: tuple[VerifiedRun, ...]
    problems: tuple[VerifyProblem, ...]
    notes: tuple[str, ...]
    """What the reader should know; these are not faults."""
    warnings: tuple[str, ...] = ()
    """Findings that a sound study may have, and that may also be the sign of a broken model."""

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "ok": self.ok,
            "runs": [
                {
                    "directory": run.directory,
                    "planned": run.planned,
                    "completed": run.completed,
                    "failed": run.failed,
                }
                for run in self.runs
            ],
            "problems": [{"file": problem.file, "message": problem.message} for problem in self.problems],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

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
        go_on = (
            "`mllm-shapx run --config CONFIG --resume` does again what is missing or damaged, --overwrite all"
        )
        fix = "" if self.ok else f"; {go_on}"
        lines.append(
            f"{len(self.runs)} run(s), {samples} sample(s), {failed} quarantined row(s): {verdict}{fix}"
        )
        return "\n".join(lines)


def verify(directories: Sequence[str]) -> VerifyReport:
    """Check experiment sets' or runs' directories; nothing is changed.

    Raises:
        UsageError: When a directory holds no results.
        StorageError: When a directory cannot be read.
    """
    runs: list[VerifiedRun] = []
    problems: list[VerifyProblem] = []
    notes: list[str] = []
    warnings: list[str] = []
    for directory in directories:
        study = open_study(directory)
        holder = lock_holder(study.storage)
        if holder is not None:
            notes.append(
                f"{study.storage.uri} is being written by {holder}; verify it again when that is done"
            )
        made_from: dict[str, MadeFrom] = {}
        for run in study.runs:
            check = _RunCheck(run.records)
            runs.append(check.check())
            problems += check.problems
            notes += check.notes
            warnings += check.warnings
            made_from[run.name] = check.made_from
        found, remarks = _content_problems(study, made_from)
        problems += found
        notes += remarks
        problems += _store_problems(study.storage)
    return VerifyReport(tuple(runs), tuple(problems), tuple(notes), tuple(warnings))


class _RunCheck:
    """The checks of one run."""

    def __init__(self, records: RunReader) -> None:
        self._records = records
        self._storage = records.storage
        self._layout = records.layout
        self.problems: list[VerifyProblem] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.made_from: dict[int, str] = {}
        """Row -> what its sample was made from."""

    def check(self) -> VerifiedRun:
        spec = self._spec()
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
        self._constant(summary)
        self._leftovers()
        return VerifiedRun(
            directory=self._storage.locate(self._records.run_name),
            planned=None if planned is None else len(planned),
            completed=len(completed),
            failed=len(failed),
        )

    def _add(self, path: str, message: str) -> None:
        self.problems.append(VerifyProblem(self._storage.locate(path), message))

    def _rows(self, path: str, rows: frozenset[int], what: str) -> None:
        """Add one problem for all the rows of a kind."""
        if not rows:
            return
        shown = ", ".join(str(row) for row in sorted(rows)[:_SHOWN_ROWS])
        more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
        self._add(path, f"{len(rows)} {what}: row {shown}{more}")

    def _spec(self) -> dict[str, Any]:
        try:
            spec = self._records.read_spec()
        except ValueError as error:
            self._add(self._layout.spec, str(error))
            return {}
        if spec is None:
            self._add(self._layout.spec, "it is missing, so that counts cannot be held against the plan")
        return spec or {}

    def _planned(self, spec: dict[str, Any]) -> frozenset[int] | None:
        try:
            planned = planned_rows(spec)
        except ValueError as error:
            self._add(self._layout.spec, str(error))
            return None
        if is_of_older_runner(spec):
            self.notes.append(
                f"{self._storage.locate(self._records.run_name)} was written by the older runner, which does "
                "not record which rows were selected: counts were not held against a plan"
            )
        elif planned is None and spec:
            self._add(self._layout.spec, "it does not say which rows were selected")
        return planned

    def _samples(self, checks: Sequence[ValueCheck], summary: RunSummary) -> frozenset[int]:
        rows = self._records.sample_paths()
        completed = set()
        for path, content in self._storage.read_many(list(rows)):
            if isinstance(content, OSError):
                self._add(path, f"it cannot be read ({content.strerror or content})")
                continue
            try:
                sample = self._records.decode_sample(rows[path], content)
            except ValueError as error:
                self._add(path, str(error))
                continue
            completed.add(sample.row_index)
            self.made_from[sample.row_index] = sample.made_from
            summary.add(sample)
            for check in checks:
                for message in check(sample):
                    self._add(path, message)
        return frozenset(completed)

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
        try:
            checkpoint = self._records.read_checkpoint()
        except ValueError as error:
            self._add(path, str(error))
            return
        if checkpoint is None:
            self._add(path, "it is missing")
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
        is_done = planned <= completed
        if not 0 <= checkpoint.next_index <= len(planned) or is_done != (
            checkpoint.next_index == len(planned)
        ):
            state = "all" if is_done else "not all"
            self._add(
                path,
                f"next_index is {checkpoint.next_index}, though {state} of {len(planned)} rows are completed",
            )

    def _summary(self, summary: RunSummary, spec: dict[str, Any]) -> None:
        path = self._layout.summary
        try:
            found = self._records.read_summary()
        except ValueError as error:
            self._add(path, str(error))
            return
        if found is None:
            self._add(path, "it is missing")
            return
        expected = summary.to_json()
        if N_CONSTANT not in found:
            del expected[N_CONSTANT]  # written by an earlier version
        if is_of_older_runner(spec):
            expected = {key: expected[key] for key in OLDER_KEYS}
        different = different_keys(found, expected)
        if different:
            self._add(path, f"it differs from what the samples give: {', '.join(different)}")

    def _constant(self, summary: RunSummary) -> None:
        if summary.n_constant:
            self.warnings.append(
                f"{self._storage.locate(self._records.run_name)}: in {summary.n_constant} of "
                f"{summary.n_samples} sample(s) every coalition has the same answer, so that the values are "
                "equal and say nothing of the words"
            )

    def _leftovers(self) -> None:
        for path in self._records.temp_files():
            self._add(path, "it is left over from a write that was cut short")


def _content_problems(
    study: StudyFiles, made_from: Mapping[str, MadeFrom]
) -> tuple[list[VerifyProblem], tuple[str, ...]]:
    """Return samples whose rows differ from the dataset's or from the other runs', and notes."""
    changes, notes = compare_with_dataset([(run, made_from[run.name]) for run in study.runs])
    problems = [
        VerifyProblem(
            study.storage.uri,
            f"{found}; put the dataset back, or let `run --resume --accept-changed-rows` explain these rows "
            "again",
        )
        for found in changes
    ]
    mixed = mixed_rows(made_from)
    if mixed:
        message = f"{len(mixed)} row(s) were explained from other content in some runs than in others: row "
        problems.append(VerifyProblem(study.storage.uri, message + ", ".join(map(str, mixed[:_SHOWN_ROWS]))))
    return problems, tuple(f"{study.storage.uri}: {note}" for note in notes)


def _store_problems(storage: Storage) -> list[VerifyProblem]:
    return [
        VerifyProblem(
            storage.locate(path), f"{message}; a run that needs it moves it aside, else remove it by hand"
        )
        for path, message in CoalitionStore(storage).problems()
    ]
