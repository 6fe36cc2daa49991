"""The samples that were given up: which, why, and the file with the details."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mllm_shapx.records.failures import FailureRecord
from mllm_shapx.reporting.grid import cut, grid, names, numbers, words
from mllm_shapx.reporting.reading import open_study

_SHOWN = ("row_index", "run_name", "reason", "attempts", "node", "worker", "message", "at")
"""Fields of a failure in the list's JSON data."""


@dataclass(frozen=True, slots=True)
class ListedFailure:
    """One sample that was given up."""

    record: FailureRecord
    path: str
    """The file with traceback and log lines, in full."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON data with the whole message. Traceback and log are only in the file."""
        return {**{key: getattr(self.record, key) for key in _SHOWN}, "path": self.path}


@dataclass(frozen=True, slots=True)
class FailureList:
    """The samples of a study that were given up."""

    directory: str
    failures: tuple[ListedFailure, ...]
    """By run and row."""
    reasons: tuple[str, ...] = ()
    """The reasons of the listed failures; empty for all reasons."""

    def by_reason(self) -> dict[str, int]:
        """Return how many there are of each reason, the most frequent first."""
        return dict(Counter(failure.record.reason for failure in self.failures).most_common())

    def rows_by_run(self) -> dict[str, tuple[int, ...]]:
        """Return run -> its rows that were given up."""
        rows: dict[str, list[int]] = {}
        for failure in self.failures:
            rows.setdefault(failure.record.run_name, []).append(failure.record.row_index)
        return {name: tuple(indices) for name, indices in rows.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON data."""
        return {
            "directory": self.directory,
            "by_reason": self.by_reason(),
            "failures": [failure.to_json() for failure in self.failures],
        }

    def to_text(self, width: int = 80) -> str:
        """Return two lines per failure of at most `width` columns; paths are never cut."""
        if not self.failures:
            of_reason = f" because of {' or '.join(self.reasons)}" if self.reasons else ""
            return f"{self.directory}: no sample was given up{of_reason}\n"
        columns = [
            *numbers("row"), *names("run"), *words("reason"), *numbers("tries"), *names("node"),
        ]  # fmt: skip
        cells = [
            [str(each.row_index), each.run_name, each.reason, str(each.attempts), each.node or "-"]
            for each in (failure.record for failure in self.failures)
        ]
        header, *lines = grid(columns, cells, width)
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason().items())
        text = [f"{self.directory}: {len(self.failures)} given up ({counts})", "", header]
        for line, failure in zip(lines, self.failures, strict=True):
            message = failure.record.message.strip().splitlines()[:1]
            text += [line, *(cut(f"     {first}", width) for first in message), f"     {failure.path}"]
        only = f" --only {self.reasons[0]}" if len(self.reasons) == 1 else ""
        text += ["", f"to try them again: mllm-shapx retry {self.directory}{only}"]
        return "\n".join(text) + "\n"


def failures(directory: str, *, reasons: Collection[str] = ()) -> FailureList:
    """Return the samples that were given up, in all runs of a directory or in its one run.

    Args:
        directory: An experiment set's directory or one run's.
        reasons: Only failures of these reasons; all when empty.

    Raises:
        UsageError: When the directory is neither.
    """
    study = open_study(directory)
    listed = []
    for run in study.runs:
        done = frozenset(run.sample_rows)
        for record in run.records.read_failures():
            # A row that has a sample by now, or still has attempts left, is not given up.
            is_given_up = record.quarantined and record.row_index not in done
            if is_given_up and (not reasons or record.reason in reasons):
                path = study.locate(run.records.layout.failure(record.row_index))
                listed.append(ListedFailure(record, path))
    return FailureList(directory, tuple(listed), tuple(sorted(reasons)))
