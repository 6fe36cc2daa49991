"""The findings of an inspection of one run's directory, and their messages."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

FaultKind = Literal["leftover", "damaged sample", "damaged failure", "damaged derived", "outdated failure"]
"""`leftover`: a temporary file of an interrupted write; `damaged derived`: a file that can be rebuilt from
the samples; `outdated failure`: the row now has a sample."""

_SHOWN_IN_A_NOTE = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that `RunRecords.heal` removes or moves aside."""

    kind: FaultKind
    path: str
    """Relative to the experiment set."""
    reason: str = ""
    """The damage of a damaged file."""


@dataclass(frozen=True, slots=True)
class RunInspection:
    """The contents of a run's directory."""

    completed: frozenset[int] = frozenset()
    """Rows with a readable, matching sample, including rows outside the selection."""
    failed: frozenset[int] = frozenset()
    """Quarantined rows without a sample."""
    attempts: Mapping[int, int] = field(default_factory=dict)
    """Attempts charged so far to rows that are not completed."""
    notes: tuple[str, ...] = ()
    """Differences between checkpoint and samples, in words."""
    created_at: float | None = None
    """`created_at` of the checkpoint, None without a readable checkpoint."""
    made_from: Mapping[int, str] = field(default_factory=dict)
    """Row -> digest of its sample's source row; see `SampleFile.made_from`."""
    calls: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Row -> (coalitions, generated answers) of its sample."""
    faults: tuple[Fault, ...] = ()
    """Damaged and leftover files."""

    def without(self, rows: Collection[int]) -> "RunInspection":
        """Return the same without the samples of `rows`."""
        return replace(
            self,
            completed=self.completed.difference(rows),
            made_from={row: digest for row, digest in self.made_from.items() if row not in rows},
            calls={row: calls for row, calls in self.calls.items() if row not in rows},
        )


def notes_of(run_name: str, findings: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return one note about a run for each kind of findings.

    Args:
        run_name: The run.
        findings: Pairs of a kind, which is a sentence with `{}` for the number, and what was found.
    """
    by_kind: dict[str, list[str]] = {}
    for kind, what in findings:
        by_kind.setdefault(kind, []).append(what)
    notes = []
    for kind, found in by_kind.items():
        rest = len(found) - _SHOWN_IN_A_NOTE
        more = f" and {rest} more" if rest > 0 else ""
        notes.append(f"{run_name}: {kind.format(len(found))}: {', '.join(found[:_SHOWN_IN_A_NOTE])}{more}")
    return tuple(notes)
