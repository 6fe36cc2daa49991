"""The progress of a study on disk: rows done, failed and left per run, and who is running it."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mllm_shapx.records.lock import lock_holder
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.reporting.failures import failures
from mllm_shapx.reporting.grid import Column, grid
from mllm_shapx.reporting.reading import RunFiles, open_study
from mllm_shapx.reporting.timing import format_duration

__all__ = ["RunStatus", "StudyStatus", "failures", "status"]

State = Literal["done", "done, some failed", "under way", "stopped", "not begun", "unknown"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run."""

    name: str
    total: int | None
    """Rows to explain, None when the files do not say."""
    done: int
    failed: int
    """Rows given up until they are tried again."""
    last_activity: float | None
    """When something was written last, seconds since 1970."""
    state: State
    of_older_runner: bool = False
    """Whether the older runner wrote it, so that it cannot be resumed."""
    damaged: int | None = None
    """Samples that cannot be read, which `done` leaves out; None where they were counted by name alone."""

    @property
    def left(self) -> int | None:
        """Rows that are neither done nor given up, None when the total is not known."""
        return None if self.total is None else max(0, self.total - self.done - self.failed)


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """The progress of a study, or of one run of it."""

    directory: str
    runs: tuple[RunStatus, ...]
    holder: str | None
    """The driver that is running it, in words; None when there is none."""

    @property
    def damaged(self) -> int:
        """Samples that cannot be read; 0 where none was opened."""
        return sum(run.damaged or 0 for run in self.runs)

    @property
    def is_checked(self) -> bool:
        """Whether every sample was read."""
        return all(run.damaged is not None for run in self.runs)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do next, in words; nothing while it runs or when all is done."""
        if self.holder is not None:
            return ()
        steps = []
        if any(run.of_older_runner for run in self.runs):
            steps.append("written by the older runner: it can be read, but not resumed")
        if any(run.left != 0 and not run.of_older_runner for run in self.runs):
            steps.append("to go on: mllm-shapx run --config CONFIG --resume")
        if any(run.failed for run in self.runs):
            steps.append(f"to see why samples failed: mllm-shapx failures {self.directory}")
        return tuple(steps)

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON data."""
        return {
            "directory": self.directory,
            "running": self.holder,
            "next_steps": list(self.next_steps),
            "done": sum(run.done for run in self.runs),
            "failed": sum(run.failed for run in self.runs),
            "damaged": self.damaged if self.is_checked else None,
            "total": self._total(),
            "runs": [{**asdict(run), "left": run.left} for run in self.runs],
        }

    def to_text(self, width: int = 80, now: float | None = None) -> str:
        """Return a table of at most `width` columns; `now` is in seconds since 1970."""
        now = time.time() if now is None else now
        columns = (
            Column("run", shrinks=True),
            Column("done", right=True),
            Column("failed", right=True),
            Column("left", right=True),
            Column("state"),
            Column("last activity"),
        )
        rows = [_cells(run, now) for run in self.runs]
        if len(self.runs) > 1:
            rows.append(self._sum_cells())
        lines = [self.directory, "", *grid(columns, rows, width), ""]
        lines.append(f"running: {self.holder}" if self.holder else "no driver is working on it")
        lines += self.next_steps
        lines += self._remarks()
        return "\n".join(lines) + "\n"

    def _remarks(self) -> list[str]:
        if not self.is_checked:
            return ["samples are counted by the names of their files; --check reads them"]
        if not self.damaged:
            return ["every sample was read"]
        runs = ", ".join(f"{run.name} ({run.damaged})" for run in self.runs if run.damaged)
        return [
            f"{self.damaged} sample(s) are damaged: {runs}; `verify` names them, --resume makes them again"
        ]

    def _total(self) -> int | None:
        totals = [run.total for run in self.runs]
        return None if None in totals else sum(total for total in totals if total is not None)

    def _sum_cells(self) -> list[str]:
        lefts = [run.left for run in self.runs]
        left = "?" if None in lefts else str(sum(item for item in lefts if item is not None))
        done = f"{sum(run.done for run in self.runs)}/{_or_unknown(self._total())}"
        return ["in all", done, str(sum(run.failed for run in self.runs)), left, "", ""]


def status(directory: str, *, check: bool = False) -> StudyStatus:
    """Return the progress of the study in an experiment set's directory, or in one run's.

    Sample files are counted by name and not opened, so that a large study answers at once; with `check`
    every one is read, and those that are damaged are not done.

    Raises:
        UsageError: When the directory is neither.
    """
    study = open_study(directory)
    holder = lock_holder(study.storage)
    runs = tuple(_run_status(run, is_held=holder is not None, check=check) for run in study.runs)
    return StudyStatus(directory, runs, None if holder is None else str(holder))


def _run_status(run: RunFiles, *, is_held: bool, check: bool) -> RunStatus:
    named = done = frozenset(run.sample_rows)
    if check:
        done = named & run.records.read_made_from().keys()
    failed = run.records.quarantined_rows() - done
    if run.planned is not None:
        failed &= run.planned
    return RunStatus(
        name=run.name,
        total=run.total,
        done=len(done),
        failed=len(failed),
        last_activity=max(_activities(run), default=None),
        state=_state(run.total, len(done), len(failed), is_held=is_held),
        of_older_runner=run.is_of_older_runner,
        damaged=len(named - done) if check else None,
    )


def _state(total: int | None, done: int, failed: int, *, is_held: bool) -> State:
    if total is not None and done + failed >= total:
        return "done, some failed" if failed else "done"
    if is_held:
        return "under way"
    if done + failed == 0:
        return "not begun"
    return "unknown" if total is None else "stopped"


def _activities(run: RunFiles) -> Iterator[float]:
    """Yield when the run's files changed, without opening samples."""
    try:
        checkpoint = run.records.read_checkpoint()
    except ValueError:
        checkpoint = None
    if checkpoint is not None:
        yield checkpoint.updated_at
    if isinstance(run.records.storage, LocalStorage):
        # A folder's time is that of the last file that was renamed into it.
        for folder in (run.records.layout.samples, run.records.layout.failures):
            try:
                yield os.stat(run.records.storage.locate(folder)).st_mtime  # noqa: PTH116 -- as storage does
            except FileNotFoundError:
                continue


def _cells(run: RunStatus, now: float) -> list[str]:
    ago = "never" if run.last_activity is None else f"{format_duration(now - run.last_activity)} ago"
    return [
        run.name,
        f"{run.done}/{_or_unknown(run.total)}",
        str(run.failed),
        _or_unknown(run.left),
        run.state,
        ago,
    ]


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)
