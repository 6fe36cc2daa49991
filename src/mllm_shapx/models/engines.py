"""The one place that decides how prompts reach a model: batched on a device, or as requests to a server."""

from mllm_shapx.models.base import Model
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.server_engine import ServerEngine
from mllm_shapx.models.server_text import ServerModel


def engine_for(model: Model, *, server_patience_s: float) -> Engine | ServerEngine:
    """Return the engine of a loaded model; it owns the model and closes it.

    Args:
        model: The loaded model.
        server_patience_s: Seconds without any answer of a server after which the study stops.
    """
    if isinstance(model, ServerModel):
        return ServerEngine(model, patience_s=server_patience_s)
    return Engine(model)
