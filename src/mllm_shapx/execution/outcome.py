"""The outcome of a study."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm_shapx.execution.messages import Study
from mllm_shapx.tracking.tracker import hints

INTERRUPTED_FROM = 128
"""Exit codes above it encode the signal that ended the work."""


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """The outcome of one config."""

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
    """Run -> number of written samples that are no longer on disk."""
    hints: tuple[str, ...] = ()
    """How to see or upload what trackers have left on this machine."""

    def to_text(self, go_on: str) -> str:
        """Return the final message for the user: results, open work and `go_on`, the command for it."""
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


def outcome_of(
    study: Study,
    done: Mapping[str, int],
    failed: Mapping[str, int],
    *,
    finished: bool,
    stopped_by: int | None = None,
    model_calls: int = 0,
    seconds: float = 0.0,
    warnings: tuple[str, ...] = (),
    on_disk: Mapping[str, int] | None = None,
) -> StudyOutcome:
    """Return the outcome of a study.

    `done` and `failed` have for each run the written samples and the quarantined rows, `on_disk` the selected
    rows with a sample, if counted: fewer than `done` are an error. `stopped_by` is a signal.
    """
    found = done if on_disk is None else on_disk
    missing = {name: count - found[name] for name, count in done.items() if found[name] < count}
    if stopped_by is not None and not finished:
        code = INTERRUPTED_FROM + stopped_by  # also if samples are missing: scripts check for it
    elif missing or not finished:
        code = 1
    else:
        code = 3 if any(failed.values()) else 0
    return StudyOutcome(
        experiment_set_id=study.experiment_set_id,
        output_uri=study.output_uri,
        done=dict(found) if missing else dict(done),
        failed=dict(failed),
        total=dict.fromkeys(done, len(study.rows)),
        model_calls=model_calls,
        seconds=seconds,
        exit_code=code,
        warnings=warnings,
        missing=missing,
        # From the start of the study: MLflow changes the environment for short times.
        hints=hints(study.trackers),
    )
