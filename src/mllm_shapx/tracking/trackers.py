"""The trackers of a study, as its config says."""

from collections.abc import Sequence
from importlib import import_module

from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.tracking.tracker import Backend


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
