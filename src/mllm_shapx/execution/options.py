"""The options of a call besides the config: resources, resuming, limits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mllm_shapx.errors import UsageError
from mllm_shapx.records.shards import Shard


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `mllm-shapx run`."""

    resume: bool = False
    overwrite: bool = False
    accept_changed_rows: bool = False
    """With `resume`: explain changed rows of the dataset again, instead of refusing."""
    max_samples: int | None = None
    """Overrides `selection.max_samples`."""
    shard: Shard | None = None
    """The part of the selected rows to explain, in a separate directory; None for all."""
    num_gpus: float | Literal["all"] | None = None
    """Total number of GPUs to use; None or "all" for all available."""
    num_workers: int | None = None
    workers_per_gpu: int = 1
    gpus_per_worker: float | None = None
    """GPUs of one worker; None for 1 / workers_per_gpu."""
    rows_in_flight: int | None = None
    """Rows that a worker explains at the same time; None for as many as fill its batches."""
    address: str | None = None
    """Ray cluster to join; None for RAY_ADDRESS, else a new cluster on this machine."""
    nodes: int = 1
    """Nodes that the cluster must have before the work begins."""
    max_attempts: int = 3
    """Attempts of a row after which it is quarantined."""
    fail_fast: bool = False
    max_failures: str | None = None
    """Stop after so many quarantined rows: a number, or a percentage such as `5%`."""
    stall_s: float = 1800.0
    """Seconds without progress after which a worker is replaced."""
    flush_s: float = 30.0
    """Seconds between two writes of a running row's answers."""
    server_patience_s: float = 600.0
    """Seconds without an answer from a server after which the study stops."""
    max_requests: int | None = None
    """Requests that this call may send to a model's server; None for any number."""
    max_tokens: int | None = None
    """Tokens of prompts and answers that this call may use on that server; None for any number."""
    grace_s: float = 30.0
    """Seconds that running samples get after the first signal."""

    retry_rows: Mapping[str, tuple[int, ...]] | None = None
    """For `retry`: run -> quarantined rows to try again, and no other rows."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: If two of them do, or if `num_gpus` or `max_failures` is another word.
        """
        if isinstance(self.num_gpus, str) and self.num_gpus != "all":
            raise UsageError(f"num_gpus={self.num_gpus!r} is neither a number nor 'all'")
        try:
            self.failures_allowed(1)
        except ValueError:
            message = f"max_failures={self.max_failures!r} is neither a number nor a percentage such as '5%'"
            raise UsageError(message) from None
        if self.resume and self.overwrite:
            raise UsageError("resume and overwrite exclude each other; give one of them")
        if self.accept_changed_rows and not self.resume:
            raise UsageError("accept_changed_rows goes with resume; give both")
        if (self.max_requests is not None or self.max_tokens is not None) and self.num_workers is not None:
            check_one_worker(self.num_workers)

    @property
    def gpus_asked(self) -> float | None:
        """Return the total number of GPUs to use; None for all available."""
        return None if isinstance(self.num_gpus, str) else self.num_gpus

    def failures_allowed(self, samples: int) -> int | None:
        """Return how many of `samples` may be quarantined, None for any number."""
        if self.fail_fast:
            return 0
        if self.max_failures is None:
            return None
        if self.max_failures.endswith("%"):
            return int(float(self.max_failures[:-1]) / 100.0 * samples)
        return int(self.max_failures)


def check_one_worker(workers: int) -> None:
    """Check that so many workers may share limits on what a server is asked.

    Raises:
        UsageError: When there is more than one.
    """
    if workers > 1:
        raise UsageError(
            f"max_requests and max_tokens are counted by one worker, and this call would start {workers}; "
            "one keeps as many requests in flight as the server takes: set num_workers to 1, or give no limit"
        )


@dataclass(frozen=True, slots=True)
class Again:
    """Retries of a failed config: their number, and the waits before them."""

    max_retries: int = 0
    retry_delay_s: float = 30.0
