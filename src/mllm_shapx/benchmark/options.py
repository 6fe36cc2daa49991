"""What a call of `bench` asks for beside the config."""

from dataclasses import dataclass

LIBRARY_SHARE = 3.0
"""The library, which takes longest by far, gets so many times the others' time."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `mllm-shapx bench`."""

    rows: int | None = None
    """Rows to explain; None for as many as the time allows."""
    seconds: float = 20.0
    """About how long each contestant is measured, the library three times as long."""
    rows_in_flight: int | None = None
    """Rows side by side; None for as many as fill the batches."""

    @property
    def library_seconds(self) -> float:
        """Return about how long the library is measured."""
        return LIBRARY_SHARE * self.seconds
