"""From a connector's name to a loaded model, and to the model's identity before anything is loaded."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.errors import ModelError
from mllm_shapx.models.identity import directory_digest, hub_commit, local_directory
from mllm_shapx.models.steadiness import Version
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
        revision = model_revision(run, model_path)
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
    directory = local_directory(run.model_id, resolve_path(run.model_id, config_path))
    return directory, model_revision(run, directory)


def model_version(run: RunSpec, config_path: Path) -> tuple[Path | None, Version]:
    """Return the local directory, None for a hub id, and the version of the model that `run` names.

    Raises:
        ModelError: As `model_identity`, and when files change while they are read.
    """
    from mllm_shapx.config.loading import resolve_path

    check_connector(run.connector)
    directory = local_directory(run.model_id, resolve_path(run.model_id, config_path))
    version = Version.of(
        "connector_kwargs.model_id",
        () if directory is None else (directory.resolve(),),
        lambda: model_revision(run, directory),
    )
    return directory, version


def load_version(run: RunSpec, model_path: Path | None, version: Version) -> "Model":
    """Load the model that `run` asks for in the version that was found when the study began.

    Raises:
        ModelError, ResourceError: As `load_model`.
        ModelChangedError: When the files are others now.
    """
    return version.loaded(
        lambda: load_model(run, model_path, version.commit), lambda: model_revision(run, model_path)
    )


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


def model_revision(run: RunSpec, directory: Path | None) -> str:
    """Return what tells one version of the model from another: a hub commit, or a digest of its files."""
    return hub_commit(run.model_id, run.model_revision) if directory is None else directory_digest(directory)
