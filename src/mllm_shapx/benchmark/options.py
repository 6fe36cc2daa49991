"""The options of a call of `bench` besides the config."""

from dataclasses import dataclass

LIBRARY_SHARE = 3.0
"""Multiple of the others' time for the library, by far the slowest."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `mllm-shapx bench`."""

    rows: int | None = None
    """Rows to explain; None for as many as the time allows."""
    seconds: float = 20.0
    """Approximate measuring time of each contestant; the library gets three times as much."""
    rows_in_flight: int | None = None
    """Rows in flight; None for as many as fill the batches."""

    @property
    def library_seconds(self) -> float:
        """Return the approximate measuring time of the library."""
        return LIBRARY_SHARE * self.seconds
