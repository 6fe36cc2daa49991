"""The progress of a study on disk: rows done, failed and left per run, and the driver that is running."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mllm_shapx.records.lock import lock_holder
from mllm_shapx.records.progress import ProgressNote, read_progress
from mllm_shapx.records.storage import LocalStorage
from mllm_shapx.reporting.grid import grid, names, numbers, words
from mllm_shapx.reporting.reading import RunFiles, open_study
from mllm_shapx.reporting.timing import count_workers, format_duration, format_rate

State = Literal["done", "done, some failed", "under way", "stopped", "not begun", "unknown"]

_WIDE = 100
"""Columns of a terminal that the table needs to show coalitions, answers, rate and time left too."""


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
    """Whether the older runner wrote it; such a run cannot be resumed."""
    coalitions: int | None = None
    """Coalitions that the done samples evaluated; None where no file counts them."""
    answers: int | None = None
    """Answers that were generated for the done samples of this run; None where no file counts them."""
    samples_per_second: float | None = None
    """The rate of a driver's last measurement; None without one."""
    damaged: int | None = None
    """Samples that cannot be read, which `done` leaves out; None where they were counted by name alone."""

    @property
    def left(self) -> int | None:
        """Rows that are neither done nor given up, None when the total is not known."""
        return None if self.total is None else max(0, self.total - self.done - self.failed)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the measured rate; None where that is not known."""
        if not self.left or not self.samples_per_second:
            return None
        return self.left / self.samples_per_second


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """The progress of a study, or of one run of it."""

    directory: str
    runs: tuple[RunStatus, ...]
    holder: str | None
    """The driver that is running it, in words; None when there is none."""
    note: ProgressNote | None = None
    """A driver's progress at its last write; None without a readable note."""

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
        progress = None if self.note is None else asdict(self.note)
        if progress is not None:
            del progress["runs"]  # these figures are in the runs below
        return {
            "directory": self.directory,
            "running": self.holder,
            "next_steps": list(self.next_steps),
            "done": sum(run.done for run in self.runs),
            "failed": sum(run.failed for run in self.runs),
            "damaged": self.damaged if self.is_checked else None,
            "total": self._total,
            "progress": progress,
            "runs": [
                {**asdict(run), "left": run.left, "seconds_left": run.seconds_left} for run in self.runs
            ],
        }

    def to_text(self, width: int = 80, now: float | None = None, most_runs: int | None = None) -> str:
        """Return a table of at most `width` columns.

        Args:
            width: Columns; below 100 the table leaves out coalitions, answers, rate and time left.
            now: Seconds since 1970.
            most_runs: Runs that are shown; those under way come first. None for all.
        """
        now = time.time() if now is None else now
        shown = self.runs
        if most_runs is not None and len(shown) > most_runs:
            shown = tuple(sorted(shown, key=lambda run: run.state != "under way")[: max(1, most_runs)])
        cells = [_cells(run, now) for run in shown]
        if len(self.runs) > 1:
            cells.append(self._sums())
        wide = numbers("coalitions", "answers", "rate", "time left") if width >= _WIDE else []
        counts = numbers("done", "failed", "left")
        columns = [*names("run"), *counts, *words("state"), *wide, *words("last activity")]
        rows = [[of_run.get(str(column.header), "") for column in columns] for of_run in cells]
        lines = [self.directory, "", *grid(columns, rows, width), ""]
        if hidden := len(self.runs) - len(shown):
            lines.insert(-1, f"... and {hidden} more")
        lines.append(f"running: {self.holder}" if self.holder else "no driver is working on it")
        if self.holder and self.note is not None:
            lines.append(_pace_in_words(self.note, now))
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

    @property
    def _total(self) -> int | None:
        return _sum(run.total for run in self.runs)

    def _sums(self) -> dict[str, str]:
        """Return the cells of all runs together."""
        left = _sum(run.left for run in self.runs)
        seconds_left = None if self.note is None or left == 0 else self.note.seconds_left
        return {
            "run": "in all",
            "done": f"{sum(run.done for run in self.runs)}/{_or_unknown(self._total)}",
            "failed": str(sum(run.failed for run in self.runs)),
            "left": _or_unknown(left),
            "coalitions": _thousands(_sum(run.coalitions for run in self.runs)),
            "answers": _thousands(_sum(run.answers for run in self.runs)),
            "time left": "" if seconds_left is None else format_duration(seconds_left),
        }


def status(directory: str, *, check: bool = False) -> StudyStatus:
    """Return the progress of the study in an experiment set's directory, or in one run's.

    Sample files are counted by name and not opened, which takes a moment even in a large study. With `check`
    each one is read, and damaged ones do not count as done.

    Raises:
        UsageError: When the directory is neither.
    """
    study = open_study(directory)
    holder = lock_holder(study.storage)
    note = read_progress(study.storage)
    runs = tuple(_run_status(run, note, is_held=holder is not None, check=check) for run in study.runs)
    return StudyStatus(directory, runs, None if holder is None else str(holder), note)


def _run_status(run: RunFiles, note: ProgressNote | None, *, is_held: bool, check: bool) -> RunStatus:
    named = done = frozenset(run.sample_rows)
    if check:
        done = named & run.records.read_made_from().keys()
    failed = run.records.quarantined_rows() - done
    if run.planned is not None:
        failed &= run.planned
    coalitions, answers = _calls(run, note)
    pace = None if note is None else note.runs.get(run.name)
    return RunStatus(
        coalitions=coalitions,
        answers=answers,
        samples_per_second=None if pace is None else pace.samples_per_second,
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


def _calls(run: RunFiles, note: ProgressNote | None) -> tuple[int | None, int | None]:
    """Return coalitions and answers of the done samples, from the file that counts more samples."""
    summary = run.summary
    summed = int(summary.get("n_samples", 0)) if "n_calls_total" in summary else None
    pace = None if note is None else note.runs.get(run.name)
    if pace is not None and (summed is None or pace.samples >= summed):
        return pace.coalitions, pace.answers
    if summed is None:
        return None, None
    answers = summary.get("model_calls_total")
    return int(summary["n_calls_total"]), None if answers is None else int(answers)


def _pace_in_words(note: ProgressNote, now: float) -> str:
    parts = [count_workers(note.workers)]
    if note.coalitions_per_second:
        parts.append(f"{format_rate(note.coalitions_per_second)} coalitions")
    if note.store_hits:
        parts.append(f"{note.store_hits:,} answers from the store")
    if note.seconds_left is not None:
        parts.append(f"{format_duration(note.seconds_left)} left")
    return f"{', '.join(parts)} ({_ago(note.at, now)})"


def _activities(run: RunFiles) -> Iterator[float]:
    """Yield times at which the run's files changed, without opening samples."""
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


def _cells(run: RunStatus, now: float) -> dict[str, str]:
    return {
        "run": run.name,
        "done": f"{run.done}/{_or_unknown(run.total)}",
        "failed": str(run.failed),
        "left": _or_unknown(run.left),
        "state": run.state,
        "coalitions": _thousands(run.coalitions),
        "answers": _thousands(run.answers),
        "rate": format_rate(run.samples_per_second) if run.samples_per_second and run.left else "",
        "time left": "" if run.seconds_left is None else format_duration(run.seconds_left),
        "last activity": "never" if run.last_activity is None else _ago(run.last_activity, now),
    }


def _ago(at: float, now: float) -> str:
    return f"{format_duration(now - at)} ago"


def _sum(counts: Iterable[int | None]) -> int | None:
    """Return the sum, None when a count is not known."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def _thousands(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)
