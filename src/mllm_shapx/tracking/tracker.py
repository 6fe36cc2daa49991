"""What the study asks of a tracker, and what the module of a tracker has: `place`, a `Placed`, a `Backend`.

`place(block, experiment_set_id, output_uri)` is called where the command is. It gets the config's block, the
name of the set and its directory, and returns a `Placed`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.history import History

Line = Mapping[str, float | str]
"""One sample's metrics, with the counter `history.COUNTER`."""


class Tracker(Protocol):
    """Follows the runs of a study. No method waits for a server or raises because of it, except `close`."""

    def start(
        self, run_name: str, spec: Mapping[str, Any], *, records: RunRecords | None = None, salt: str = ""
    ) -> None:
        """Open one run with `spec` as its config; secrets in it are left out.

        Args:
            run_name: The run's name in the sweep and in the tracker.
            spec: JSON data, such as the content of `spec.json`.
            records: The run's files. Samples that the history lacks are read from them.
            salt: Part of the id. Give what a fresh start changes and a resumed one keeps, such as the
                checkpoint's `created_at`, so that a run that is done anew does not append to the old one.
        """

    def log_sample(self, result: SampleResult) -> None:
        """Log one sample of a started run."""

    def finish(self, run_name: str, summary: Mapping[str, Any]) -> None:
        """Close one run with its summary and its files; an unknown run is ignored.

        Args:
            run_name: A started run.
            summary: JSON data, such as the content of `aggregate_metrics.json`.
        """

    def begin_close(self) -> None:
        """Let it end once it has sent what is left, without waiting for it."""

    def close(self) -> None:
        """Send what is left for a limited time, mark unfinished runs as failed, and stop."""


class Placed(Protocol):
    """A tracker that a config asks for, with every path and address that depends on where the command is.

    It is pickled: samples are tracked in another process than the command's, maybe in another directory.
    """

    def open(self, *, warn: Callable[[str], None]) -> Tracker:
        """Return the tracker, which a `BackgroundTracker` does. `warn` may be called from other threads."""

    def hint(self) -> str | None:
        """Return how to see or upload what it has left on this machine, in words; None for nothing."""


@dataclass(frozen=True, slots=True)
class RunStart:
    """One run to open."""

    name: str
    identity: str
    """The same for every start of the run (`content.run_id`)."""
    config: Mapping[str, Any]
    """The spec without secrets."""
    records: RunRecords | None


class TrackedRun(Protocol):
    """One open run of a backend. Every method may raise whatever the tracker's library raises."""

    history: History
    """What the run holds; the caller adds each line to it."""

    @property
    def recovers(self) -> bool:
        """Whether `reload` can tell after an error what arrived."""

    def reload(self) -> None:
        """Ask the tracker again what the run holds."""

    def log(self, line: Line) -> None:
        """Add one sample; it may wait for `flush`."""

    def flush(self) -> None:
        """Hand over what waits."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add the summary and the run's files."""

    def close(self, *, failed: bool) -> None:
        """End the run. A TimeoutError says that the server is gone."""


class Backend(Protocol):
    """One tracker's library. All calls come from one thread, which no worker waits for."""

    name: str
    """The tracker's name in messages."""
    extra: str
    """The extra of the package and the key of the config that it needs."""
    after_timeout: str
    """What becomes of the rest when the server is gone; the end of a sentence."""

    def open(self, run: RunStart) -> TrackedRun:
        """Open a run, or go on with the one that has its identity.

        Raises:
            ImportError: When the library is not installed.
            Exception: Whatever else it raises.
        """

    def close(self) -> None:
        """Write or send everything; called last."""
