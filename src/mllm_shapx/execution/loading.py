"""A worker's dataset, model and encoders in memory."""

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mllm_shapx.config.models import RuntimeConfig
from mllm_shapx.data.conversations import load_row
from mllm_shapx.data.table import Table
from mllm_shapx.execution.dataset import open_study_table
from mllm_shapx.execution.messages import Study
from mllm_shapx.explaining.audio_records import DecodeAudio
from mllm_shapx.explaining.settings import plugins
from mllm_shapx.explaining.unit import ModelAnswers, RowExplainer
from mllm_shapx.models.base import Model, PromptEngine, SpeaksAudio
from mllm_shapx.models.encoder import TextEncoder
from mllm_shapx.models.registry import engine_for, load_version
from mllm_shapx.planning.runs import RunSpec


@dataclass(frozen=True)
class Loaded:
    """Dataset, engine and answers with which a worker explains rows."""

    table: Table
    engine: PromptEngine
    answers: ModelAnswers
    """Answers and vectors of the engine's model, and vectors of the external encoders."""

    @property
    def decode_audio(self) -> DecodeAudio | None:
        """Return the decoder from audio frames to a waveform; None for a model without audio output."""
        model = self.engine.model
        return model.decode_audio if isinstance(model, SpeaksAudio) else None

    def open_row(self, row_index: int, run: RunSpec) -> RowExplainer:
        """Read a row for the runs of one generation key; `run` is any of them. See `RowExplainer`."""
        return RowExplainer(load_row(self.table, row_index, run.dataset, run.modality), run)


LoadModel = Callable[[Study], Model]
"""Loads the model of a study. With Ray it is pickled and called in the worker's process."""


def load_study_model(study: Study) -> Model:
    """Load the model, in the version of the start of the study.

    Raises:
        ModelError, ResourceError: When it cannot be loaded.
        ModelChangedError: When its files have changed since.
    """
    settings = study.runs[0].model_settings
    return load_version(settings, study.model_path, study.model_version, study.config_path)


def model_key(study: Study) -> tuple[object, ...]:
    """Return a key that is equal for studies with the same model, loaded in the same way."""
    return study.runs[0].model_settings, study.model_path, study.model_version


class ModelShelf:
    """Keeps the model of an ended study for the next one, in one process."""

    def __init__(self, load: LoadModel) -> None:
        self._load = load
        self._kept: tuple[tuple[object, ...], Model] | None = None

    def take(self, study: Study) -> Model:
        """Return the kept model if it is the study's; else close it and load the study's."""
        if self._kept is not None and self._kept[0] == model_key(study):
            model, self._kept = self._kept[1], None
            return model
        self.close()
        return self._load(study)

    def put(self, study: Study, model: Model) -> None:
        """Keep the model of `study`, which is no longer in use."""
        self._kept = (model_key(study), model)

    def close(self) -> None:
        """Close the kept model, if there is one."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[1].close()


def load_all(study: Study, load: LoadModel) -> Loaded:
    """Open the dataset, load the model with `load`, load the encoders.

    Raises:
        DatasetError, ModelError, ResourceError: When one of them cannot be used.
        ModelChangedError: When files differ from those at the start of the study.
    """
    with _no_collection():
        _silence_libraries()
        plugins()  # a slow search: not during the first row
        with ThreadPoolExecutor(1) as beside:
            opened = beside.submit(open_study_table, study)
            model = load(study)
    with contextlib.ExitStack() as failing:
        failing.callback(model.close)
        table = opened.result()
        # Before the first answer: without its encoder no row can be scored.
        encoders = {config: TextEncoder.load(config, version) for config, version in study.encoders.items()}
        failing.pop_all()
    engine = engine_for(model, study.server_limits)
    return Loaded(table, engine, ModelAnswers(engine, encoders))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: torch and transformers are imported in a fifth less time without it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class DeviceLostError(RuntimeError):
    """The device no longer works in this process; it may work in another one."""


def is_device_lost(error: BaseException) -> bool:
    """Return whether all later calls to the device would fail too, as after CUDA's device-side assert."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def free_memory(runtime: RuntimeConfig, ended_units: int) -> None:
    """Free memory at the interval of the config; `ended_units` counts the units so far."""
    interval = 1 if runtime.gc_after_each_sample else runtime.gc_interval
    if interval and ended_units % interval == 0:
        gc.collect()
    if runtime.cuda_empty_cache:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def gpu_memory() -> tuple[int, int] | None:
    """Return (bytes in use, total bytes) of this process's GPUs; None if it uses none."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    pairs = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    total = sum(size for _, size in pairs)
    return total - sum(free for free, _ in pairs), total


class _Once(logging.Filter):
    """Passes each warning once, ignoring its numbers: some repeat for every row."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.msg not in self._said
        self._said.add(record.msg)
        return is_new


_once = _Once()


def _silence_libraries() -> None:
    """Keep libraries from writing into the progress display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("mllm_shap.estimation._shared").addFilter(_once)
