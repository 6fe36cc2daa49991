"""The trackers of a study, as its config says; each fails on its own."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.tracker import Placed, Tracker


def placed_trackers(experiment_set: ExperimentSet, output_uri: str) -> tuple[Placed, ...]:
    """Return the trackers that a config names. Call it where the command is called.

    A tracker is the module of this room that is named like its block.

    Args:
        experiment_set: The config.
        output_uri: The experiment set's directory.
    """
    return tuple(
        import_module(f"mllm_shapx.tracking.{key}").place(block, experiment_set.experiment_set_id, output_uri)
        for key, block in experiment_set.trackers.items()
        if block.enabled
    )


def hints(placed: Sequence[Placed]) -> tuple[str, ...]:
    """Return how to see or upload what trackers have left on this machine, in words."""
    return tuple(hint for each in placed if (hint := each.hint()) is not None)


class Trackers:
    """Passes what happens on to several trackers. It is a `Tracker` itself.

    Args:
        placed: The trackers.
        warn: Takes warnings. It is called from other threads.
    """

    def __init__(self, placed: Sequence[Placed], *, warn: Callable[[str], None]) -> None:
        self._trackers: list[Tracker] = [each.open(warn=warn) for each in placed]

    def start(
        self, run_name: str, spec: Mapping[str, Any], *, records: RunRecords | None = None, salt: str = ""
    ) -> None:
        """See `Tracker.start`."""
        for tracker in self._trackers:
            tracker.start(run_name, spec, records=records, salt=salt)

    def log_sample(self, result: SampleResult) -> None:
        """See `Tracker.log_sample`."""
        for tracker in self._trackers:
            tracker.log_sample(result)

    def finish(self, run_name: str, summary: Mapping[str, Any]) -> None:
        """See `Tracker.finish`."""
        for tracker in self._trackers:
            tracker.finish(run_name, summary)

    def begin_close(self) -> None:
        """See `Tracker.begin_close`."""
        for tracker in self._trackers:
            tracker.begin_close()

    def close(self) -> None:
        """See `Tracker.close`. No tracker waits for another one."""
        self.begin_close()
        for tracker in self._trackers:
            tracker.close()
