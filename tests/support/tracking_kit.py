"""Trackers, samples and loopback servers for tests of trackers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_shapx.config.models import MlflowConfig, WandbConfig
from mllm_shapx.records.results import AttributionSummary, ConversationEntry, SampleResult
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.storage import open_storage
from mllm_shapx.tracking.background import BackgroundTracker
from mllm_shapx.tracking.mlflow import Mlflow
from mllm_shapx.tracking.wandb import Wandb, effective_mode

TRACK_TWO_RUNS = """
    import sys
    from mllm_shapx.config.models import ExperimentSet
    from mllm_shapx.records.runs import RunRecords
    from mllm_shapx.records.storage import open_storage
    from mllm_shapx.tracking.background import BackgroundTracker
    from mllm_shapx.tracking.tracker import placed_trackers
    study = {{"experiment_set_id": "study", "experiments": [{{"explainer_type": "exact"}}], **{blocks}}}
    for backend in placed_trackers(ExperimentSet.model_validate(study), {folder!r}):
        tracker = BackgroundTracker(backend, "study", warn=lambda text: print("WARNED", text))
        for name in ("a", "b"):
            tracker.start(name, {{}}, records=RunRecords(open_storage({folder!r}), name))
        for name in ("a", "b"):
            tracker.finish(name, {{}})
        tracker.close()
    print("IMPORTED", *({{"mlflow", "wandb"}} & set(sys.modules)))
"""
"""A program that tracks as a config's `blocks` say, and prints what was imported."""


def wandb_tracker(
    config: WandbConfig, folder: Path, *, timeout_s: float = 30.0, **options: Any
) -> BackgroundTracker:
    """Return a tracker of the set `study` that has W&B's files in `folder`."""
    backend = Wandb(config, effective_mode(config), "study", folder, timeout_s=timeout_s)
    return BackgroundTracker(backend, "study", **options)


def mlflow_tracker(
    config: MlflowConfig, set_id: str, *, timeout_s: float = 15.0, **options: Any
) -> BackgroundTracker:
    """Return a tracker that sends to MLflow."""
    return BackgroundTracker(Mlflow(config, set_id, timeout_s), set_id, **options)


def records_of(folder: Path, run_name: str) -> RunRecords:
    """Return the files of a run in a set's directory."""
    return RunRecords(open_storage(str(folder)), run_name)


def make_sample(run_name: str, row_index: int, *, grand: float = 1.0) -> SampleResult:
    """Return a sample of two words; the first has the larger value."""
    entry = ConversationEntry(0, (0, 0), ("red", " <car>"), (0.75, -0.25))
    return SampleResult(
        run_name=run_name,
        row_index=row_index,
        language="en",
        original_language="unknown",
        runtime_sec=0.5,
        n_calls=4,
        model_calls=3,
        prompt_texts=("red <car>",),
        input_modality="text",
        output_modality="text",
        attr_summary=AttributionSummary(1.0, 0.0, 1.0, 0.0, 2, 0),
        conversation=((entry,),),
        base_value=0.25,
        grand_value=grand,
        response="stop",
        seed=1,
        num_players=2,
        values_sum=0.5,
    )


@contextmanager
def silent_server() -> Iterator[int]:
    """Yield the port of a server on loopback that accepts connections and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for connection in held:
        connection.close()
