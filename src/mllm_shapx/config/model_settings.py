"""A config's settings of its model: all that is needed to find, load and ask it."""

from dataclasses import dataclass, field

from mllm_shapx.config.models import ChatConfig, ConnectorKwargs
from mllm_shapx.config.scoring import GenerationBlock


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The settings of one model. Runs with the same generation key have equal ones."""

    connector: str
    model_id: str
    """Hub id, local directory, or the model's name on a server."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None for a local directory."""
    kwargs: ConnectorKwargs = field(default_factory=ConnectorKwargs)
    device: str | None = None
    """None for the best device of the machine."""
    generation: GenerationBlock = field(default_factory=GenerationBlock)
    chat: ChatConfig = field(default_factory=ChatConfig)
