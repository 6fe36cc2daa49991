"""A row whose explanation failed: `failures/sample_*.json`."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from mllm_shapx.records.fields import Real, Whole, validated


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """A row's failed attempts in one run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    row_index: Whole
    run_name: str
    reason: str
    """A short stable word for listing and filtering, such as `no_players` or `worker_died`."""
    message: str
    """The error, in words."""
    attempts: Whole
    """Attempts charged to this row."""
    quarantined: bool
    """Whether the row is quarantined until `retry`; else only its attempts are recorded."""
    node: str | None = None
    worker: str | None = None
    traceback: str | None = None
    log_tail: tuple[str, ...] = ()
    """The worker's last log lines, the oldest first."""
    at: Real = 0.0
    """Time of the last failure, seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """Return the file's JSON data."""
        return {**asdict(self), "log_tail": list(self.log_tail)}

    @staticmethod
    def from_json(data: Any) -> "FailureRecord":
        """Read the file's JSON data back; unknown fields are left out.

        Raises:
            ValueError: When a field is missing or of the wrong type; the message names it.
        """
        return validated(_adapter(), data)


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[FailureRecord]:
    return TypeAdapter(FailureRecord)
