"""How a study ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mllm_shapx.execution.messages import Snapshot

INTERRUPTED_FROM = 128
"""Exit codes above it say by which signal the work was ended."""


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """What became of one config."""

    experiment_set_id: str
    output_uri: str
    done: dict[str, int]
    """Run -> rows with a sample."""
    failed: dict[str, int]
    """Run -> quarantined rows."""
    total: dict[str, int]
    """Run -> selected rows."""
    model_calls: int
    seconds: float
    exit_code: int
    """0 all done; 3 done, with quarantined samples; 129, 130 or 143 interrupted; 1 stopped early."""
    warnings: tuple[str, ...] = ()
    missing: dict[str, int] = field(default_factory=dict)
    """Run -> samples that were written and are not on disk any more."""

    def to_text(self, go_on: str) -> str:
        """Return what the user should know at the end: what is done, what is not, and what to do next.

        Args:
            go_on: The command that goes on with what is left.
        """
        done, failed, total = (sum(counts.values()) for counts in (self.done, self.failed, self.total))
        line = f"{self.experiment_set_id}: {done} of {total} samples in {self.output_uri}"
        line += f" ({self.model_calls:,} model calls, {self.seconds:.0f} s)"
        lines = [line]
        if self.missing:
            runs = ", ".join(f"{name} ({count})" for name, count in self.missing.items())
            lines.append(
                f"error: {sum(self.missing.values())} sample(s) that were written are not on disk any more: "
                f"{runs}. Something removed them while the study ran; they can be made again"
            )
        if failed:
            lines.append(
                f"{failed} sample(s) are quarantined: mllm-shapx failures {self.output_uri}; "
                f"to try them again: mllm-shapx retry {self.output_uri}"
            )
        if done + failed < total:
            lines.append(f"to go on: {go_on}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON data."""
        return {
            "experiment_set_id": self.experiment_set_id,
            "output": self.output_uri,
            "runs": [
                {"name": name, "done": self.done[name], "failed": self.failed[name], "total": total}
                for name, total in self.total.items()
            ],
            "model_calls": self.model_calls,
            "seconds": self.seconds,
            "missing": self.missing,
            "exit_code": self.exit_code,
        }


def counted(outcome: StudyOutcome, on_disk: Mapping[str, int]) -> StudyOutcome:
    """Return the outcome with the samples that are on disk; fewer than were written are an error.

    Args:
        outcome: What the writers of the files say.
        on_disk: Run -> selected rows that have a sample.
    """
    missing = {name: done - on_disk[name] for name, done in outcome.done.items() if on_disk[name] < done}
    if not missing:
        return outcome
    # An interrupted study says so all the same: 130 and 143 are what scripts look for.
    code = outcome.exit_code if outcome.exit_code > INTERRUPTED_FROM else 1
    return replace(outcome, done=dict(on_disk), missing=missing, exit_code=code)


def ended(snapshot: Snapshot) -> int:
    """Return the exit code of a study that was not interrupted."""
    if not snapshot.finished:
        return 1
    return 3 if any(snapshot.failed.values()) else 0
