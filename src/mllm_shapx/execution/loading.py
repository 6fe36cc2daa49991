"""What a worker holds in memory: the dataset, the model and the encoders of the runs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from mllm_shapx.data.table import Table
from mllm_shapx.execution.dataset import open_study_table
from mllm_shapx.execution.messages import Study
from mllm_shapx.explaining.settings import plugins
from mllm_shapx.explaining.unit import ModelAnswers
from mllm_shapx.models.base import Model
from mllm_shapx.models.encoder import TextEncoder
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.engines import engine_for
from mllm_shapx.models.registry import load_model, load_version
from mllm_shapx.models.server_engine import ServerEngine


@dataclass(frozen=True)
class Loaded:
    """What a worker explains rows with."""

    table: Table
    engine: Engine | ServerEngine
    answers: ModelAnswers
    """Answers and vectors of the engine's model, and vectors of the external encoders."""


LoadModel = Callable[[Study], Model]
"""Loads the model of a study. With Ray it is pickled and called in the worker's process."""


def load_study_model(study: Study) -> Model:
    """Load the model in the version that was found when the study began, where one is recorded.

    Raises:
        ModelError, ResourceError: When it cannot be loaded.
        ModelChangedError: When its files have changed since.
    """
    run = study.runs[0]
    if study.model_version is None:
        return load_model(run, study.model_path, study.model_commit, study.config_path)
    return load_version(run, study.model_path, study.model_version, study.config_path)


def load_all(study: Study, load: LoadModel) -> Loaded:
    """Open the dataset; load the model by `load`, and the encoders.

    Raises:
        DatasetError, ModelError, ResourceError: When one of them cannot be used.
        ModelChangedError: When files are not those that the study began with.
    """
    _silence_libraries()
    plugins()  # the search for them takes a moment, which the first row should not pay for
    table = open_study_table(study)
    model = load(study)
    # An encoder that cannot be loaded concerns every row, so that it is loaded before the first answer.
    encoders = {config: TextEncoder.load(config, version) for config, version in study.encoders.items()}
    engine = engine_for(model, server_patience_s=study.server_patience_s)
    return Loaded(table, engine, ModelAnswers(engine, encoders))


class DeviceLostError(RuntimeError):
    """The device no longer works in this process; it may work in another one."""


def is_device_lost(error: BaseException) -> bool:
    """Return whether every later call to the device would fail too, as after CUDA's device-side assert."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


class _Once(logging.Filter):
    """Lets each warning through once, whatever numbers it names: some come with every row."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.msg not in self._said
        self._said.add(record.msg)
        return is_new


_once = _Once()


def _silence_libraries() -> None:
    """Keep libraries from writing between the lines of the progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("mllm_shap.estimation._shared").addFilter(_once)
