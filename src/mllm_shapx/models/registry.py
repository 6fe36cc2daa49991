"""From a connector's name to a loaded model, and to the model's identity before anything is loaded."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.errors import ModelError
from mllm_shapx.models.identity import directory_digest, hub_commit, local_directory
from mllm_shapx.planning.runs import RunSpec

if TYPE_CHECKING:
    from mllm_shapx.models.base import Model

LOADERS = {
    "hf_text": "mllm_shapx.models.hf_text:load",
    "liquid_audio": "mllm_shapx.models.liquid_audio:load",
}
"""Connector -> `load(run, model_path, revision) -> Model`, imported when asked for.

`model_path` is the model's local directory, None for a hub id; `revision` the hub commit to load, or the
digest of the directory, to be recorded in the model's identity.
"""

_EXTRA_MODULES = {"liquid_audio": "liquid_audio"}


def load_model(run: RunSpec, model_path: Path | None, revision: str | None = None) -> "Model":
    """Load the model that `run` asks for.

    Args:
        run: Names the connector, the model and how to load it.
        model_path: Its local directory; None when it comes from the hub.
        revision: What `model_identity` found; found again when None.

    Raises:
        ModelError: When the connector's extra is not installed or the model cannot be loaded.
        ResourceError: When the device is not there.
    """
    check_connector(run.connector)
    if revision is None:
        revision = _revision(run, model_path)
    module, function = LOADERS[run.connector].split(":")
    loaded: Model = getattr(importlib.import_module(module), function)(run, model_path, revision)
    return loaded


def model_identity(run: RunSpec, config_path: Path) -> tuple[Path | None, str]:
    """Return (local directory or None, digest of the directory or hub commit) of the model `run` names.

    Loads nothing and imports no torch; reads a local directory's files once for the digest.

    Raises:
        ModelError: When the directory is not a model, the hub does not have it, or the connector's extra is
            not installed.
    """
    from mllm_shapx.config.loading import resolve_path

    check_connector(run.connector)
    gguf_file = run.connector_kwargs.gguf_file
    directory = local_directory(run.model_id, resolve_path(run.model_id, config_path), gguf_file)
    return directory, _revision(run, directory)


def check_connector(connector: str) -> None:
    """Say how to install what a connector needs when it is not there.

    Raises:
        ModelError: When the extra is not installed.
    """
    module = _EXTRA_MODULES.get(connector)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ModelError(
            f"connector {connector!r} needs the 'audio' extra, which is not installed: "
            "pip install 'mllm-shapx[audio]'  (from a clone: pip install -e '.[audio]')"
        )


def _revision(run: RunSpec, directory: Path | None) -> str:
    if directory is None:
        return hub_commit(run.model_id, run.model_revision)
    return directory_digest(directory, run.connector_kwargs.gguf_file)
