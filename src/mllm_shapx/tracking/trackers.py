"""The trackers of a study, as its config says; each fails on its own."""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm_shapx.config.models import MlflowConfig, WandbConfig
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.tracking.background import BackgroundTracker
from mllm_shapx.tracking.mlflow import MlflowTracker
from mllm_shapx.tracking.wandb import WandbTracker, effective_mode


class Trackers:
    """Passes what happens on to several trackers. It is a `Tracker` itself."""

    def __init__(self, trackers: tuple[BackgroundTracker, ...]) -> None:
        self._trackers = trackers

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

    def close(self) -> None:
        """See `Tracker.close`. No tracker waits for another one."""
        for tracker in self._trackers:
            tracker.begin_close()
        for tracker in self._trackers:
            tracker.close()


def open_trackers(
    experiment_set_id: str,
    wandb: WandbConfig,
    mlflow: MlflowConfig | None,
    *,
    output_uri: str,
    warn: Callable[[str], None],
) -> Trackers:
    """Return the trackers that a config names. A further tracker is added here.

    Args:
        experiment_set_id: Part of every run's id.
        wandb: The config's `wandb` block.
        mlflow: The config's `mlflow` block (`mlflow.located`), None where it has none.
        output_uri: The experiment set's directory.
        warn: Takes warnings. It is called from other threads.
    """
    directory = None if "://" in output_uri else Path(output_uri)
    return Trackers(
        (
            WandbTracker(wandb, experiment_set_id, directory=directory, warn=warn),
            MlflowTracker(mlflow, experiment_set_id, warn=warn),
        )
    )


def hints(wandb: WandbConfig, mlflow: MlflowConfig | None, output_uri: str) -> tuple[str, ...]:
    """Return how to see or upload what trackers have left on this machine, in words.

    Args:
        wandb: The config's `wandb` block.
        mlflow: The config's `mlflow` block (`mlflow.located`).
        output_uri: The experiment set's directory.
    """
    found = []
    folder = Path("." if "://" in output_uri else output_uri) / "wandb"
    if effective_mode(wandb) == "offline" and next(folder.glob("offline-run-*"), None) is not None:
        found.append(f"to upload it to Weights & Biases: {sync_command(folder)}")
    uri = "" if mlflow is None or not mlflow.enabled else mlflow.tracking_uri or ""
    if (file := re.fullmatch(r"sqlite:///(.+)", uri)) and Path(file[1]).exists():
        found.append(f"to see it in MLflow: mlflow ui --backend-store-uri {shlex.quote(uri)}")
    return tuple(found)


def sync_command(folder: Path) -> str:
    """Return the command that uploads all offline runs in a folder of wandb's."""
    return f"wandb sync {shlex.quote(str(folder))}/offline-run-*"
