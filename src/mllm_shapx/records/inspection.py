"""What an inspection of one run's directory finds, and how it is said."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

FaultKind = Literal["leftover", "damaged sample", "damaged failure", "damaged derived", "outdated failure"]
"""`leftover`: a temporary file of an interrupted write; `damaged derived`: a file that is made again from the
samples; `outdated failure`: the row has a sample by now."""

_SHOWN_IN_A_NOTE = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that `RunRecords.heal` removes or moves aside."""

    kind: FaultKind
    path: str
    """Relative to the experiment set."""
    reason: str = ""
    """What is wrong with a damaged file."""


@dataclass(frozen=True, slots=True)
class RunInspection:
    """What a run's directory holds."""

    completed: frozenset[int]
    """Rows with a readable sample that fits, rows outside the selection included."""
    failed: frozenset[int]
    """Quarantined rows without a sample."""
    attempts: dict[int, int]
    """Attempts charged so far, of rows that are not completed."""
    notes: tuple[str, ...]
    """Where checkpoint and samples differ, in words."""
    created_at: float | None
    """`created_at` of the checkpoint, None when there is none that can be read."""
    made_from: Mapping[int, str] = field(default_factory=dict)
    """Row -> digest of what its sample was made from, see `SampleFile.made_from`."""
    calls: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Row -> coalitions and generated answers of its sample."""
    faults: tuple[Fault, ...] = ()
    """Files that are damaged or left over."""

    def without(self, rows: Collection[int]) -> "RunInspection":
        """Return the same without the samples of `rows`."""
        return replace(
            self,
            completed=self.completed.difference(rows),
            made_from={row: digest for row, digest in self.made_from.items() if row not in rows},
            calls={row: calls for row, calls in self.calls.items() if row not in rows},
        )


class Notes:
    """Collects findings about a run; those of one kind make one note."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        """Add a finding; `kind` is a sentence with `{}` for the number of findings."""
        self._by_kind.setdefault(kind, []).append(what)

    def add_rows(self, kind: str, rows: Iterable[int]) -> None:
        """Add one finding per row."""
        for row in sorted(rows):
            self.add(kind, f"row {row}")

    def texts(self) -> tuple[str, ...]:
        """Return one note per kind."""
        return tuple(self._text(kind, found) for kind, found in self._by_kind.items())

    def _text(self, kind: str, found: list[str]) -> str:
        shown = ", ".join(found[:_SHOWN_IN_A_NOTE])
        rest = len(found) - _SHOWN_IN_A_NOTE
        more = f" and {rest} more" if rest > 0 else ""
        return f"{self._run_name}: {kind.format(len(found))}: {shown}{more}"
