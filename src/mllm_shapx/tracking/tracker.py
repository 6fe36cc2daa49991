"""The trackers of a study. Each has a module with a function `place`, which returns a `Backend`.

`place(block, experiment_set_id, output_uri)` is called in the process of the command. It gets the config's
block, the name of the set and its directory. It returns None where nothing is to be tracked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.history import History

Line = Mapping[str, float | str]
"""One sample's metrics, with the counter `history.COUNTER`."""


@dataclass(frozen=True, slots=True)
class RunStart:
    """One run to open."""

    name: str
    identity: str
    """The same for every start of the run (`content.run_id`)."""
    config: Mapping[str, Any]
    """The spec without secrets."""
    records: RunRecords


class TrackedRun(Protocol):
    """One open run of a backend. Every method may raise whatever the tracker's library raises."""

    history: History
    """The samples that the run has; the caller adds each line."""

    @property
    def recovers(self) -> bool:
        """Whether `reload` finds after an error which samples arrived."""

    def reload(self) -> None:
        """Read the run's history again."""

    def log(self, line: Line) -> None:
        """Add one sample; it may wait for `flush`."""

    def flush(self) -> None:
        """Send the samples that wait."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add the summary and the run's files."""

    def close(self, *, failed: bool) -> None:
        """End the run. A TimeoutError says that the server is gone."""


class Backend(Protocol):
    """One tracker's library, with every path and address that depends on where the command is.

    It is pickled before its first `open`: samples are tracked in another process, maybe in another directory.
    There all calls come from one thread, for which no worker waits.
    """

    name: str
    """The tracker's name in messages."""
    extra: str
    """The extra of the package and the key of the config that it needs."""
    after_timeout: str
    """What happens to the rest when the server is gone; the end of a sentence."""

    def open(self, run: RunStart) -> TrackedRun:
        """Open a run, or go on with the one that has its identity.

        Raises:
            ImportError: When the library is not installed.
            Exception: Whatever else it raises.
        """

    def close(self) -> None:
        """Write or send everything; called last."""

    def hint(self) -> str | None:
        """Return how to see or upload what it has left on this machine, in words; None for nothing."""


def placed_trackers(experiment_set: ExperimentSet, output_uri: str) -> tuple[Backend, ...]:
    """Return the trackers that a config names. Call it in the process of the command.

    A tracker is the module of this room that is named like its block.

    Args:
        experiment_set: The config.
        output_uri: The experiment set's directory.
    """
    placed = [
        import_module(f"mllm_shapx.tracking.{key}").place(block, experiment_set.experiment_set_id, output_uri)
        for key, block in experiment_set.trackers.items()
        if block.enabled
    ]
    return tuple(backend for backend in placed if backend is not None)


def hints(trackers: Sequence[Backend]) -> tuple[str, ...]:
    """Return how to see or upload what trackers have left on this machine, in words."""
    return tuple(hint for each in trackers if (hint := each.hint()) is not None)
