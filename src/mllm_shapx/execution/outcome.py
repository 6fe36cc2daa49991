"""How a study ended."""

from dataclasses import dataclass
from typing import Any

from mllm_shapx.execution.messages import Snapshot


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

    def to_text(self, go_on: str) -> str:
        """Return what the user should know at the end: what is done, what is not, and what to do next.

        Args:
            go_on: The command that goes on with what is left.
        """
        done, failed, total = (sum(counts.values()) for counts in (self.done, self.failed, self.total))
        line = f"{self.experiment_set_id}: {done} of {total} samples in {self.output_uri}"
        line += f" ({self.model_calls:,} model calls, {self.seconds:.0f} s)"
        lines = [line]
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
            "exit_code": self.exit_code,
        }


def ended(snapshot: Snapshot) -> int:
    """Return the exit code of a study that was not interrupted."""
    if not snapshot.finished:
        return 1
    return 3 if any(snapshot.failed.values()) else 0
