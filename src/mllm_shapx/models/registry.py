"""Maps a connector's name to a loaded model, and to the model's identity before loading."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.servers import CONNECTOR
from mllm_shapx.models.identity import (
    MODEL_ID,
    Version,
    local_directory,
)
from mllm_shapx.models.text_source import Place, base_commit, need, text_commit, text_source

if TYPE_CHECKING:
    from mllm_shapx.models.base import Model, PromptEngine
    from mllm_shapx.models.server_budget import ServerLimits

LOADERS = {
    "hf_text": "mllm_shapx.models.hf_text:load",
    "liquid_audio": "mllm_shapx.models.liquid_audio:load",
    CONNECTOR: "mllm_shapx.models.server_text:load",
}
"""Connector -> `load(settings, model_path, revision) -> Model`, imported on demand.

`model_path` is the model's local directory, None for a hub id; `revision` is the commit from
`model_identity`, recorded in the model's identity. A local adapter is given by its absolute path.
"""

_EXTRAS = {"liquid_audio": ("liquid_audio", "audio")}
"""Connector -> package that it needs, and the extra that installs it."""


def load_model(
    settings: ModelSettings,
    model_path: Path | None,
    revision: str | None = None,
    config_path: Path | None = None,
) -> "Model":
    """Load the model of `settings`, which lies in the directory `model_path`; None for a hub model.

    `revision` is the commit from `model_identity`, computed when None. A relative adapter is also looked up
    in the folder of `config_path`.

    Raises:
        ModelError: When the connector's extra is not installed or the model cannot be loaded.
        ResourceError: When the machine lacks the device.
    """
    check_connector(settings.connector)
    if revision is None:
        revision = model_revision(settings, model_path, config_path)
    module, function = LOADERS[settings.connector].split(":")
    settings = _with_absolute_adapter(settings, config_path)
    loaded: Model = getattr(importlib.import_module(module), function)(settings, model_path, revision)
    return loaded


def model_identity(settings: ModelSettings, config_path: Path) -> tuple[Path | None, str]:
    """Return (local directory or None, digest of the directory or hub commit) of the model of `settings`.

    With an adapter, the second is `BASE+ADAPTER`: the digest or commit of each. Loads nothing; reads a local
    directory's files once for the digest.

    Raises:
        ModelError: When the directory is not a model, its files are incomplete, the connector does not
            support the model, the hub lacks it, or an extra is not installed.
    """
    check_connector(settings.connector)
    directory = _directory(settings, config_path)
    return directory, model_revision(settings, directory, config_path)


def check_model(settings: ModelSettings, config_path: Path) -> str:
    """Check the model of `settings` without loading it; return a description.

    A server is asked for its list of models and for one answer of one token.

    Raises:
        ModelError: As `model_identity`.
    """
    _, revision = model_identity(settings, config_path)
    where = f" at {settings.kwargs.base_url}" if settings.kwargs.base_url is not None else ""
    if settings.kwargs.server is not None:
        where = " behind a server that each worker starts"
    return f"model {settings.model_id}{where} ({revision[:16]})"


def model_version(settings: ModelSettings, config_path: Path) -> tuple[Path | None, Version]:
    """Return the local directory, None for a hub id, and the version of the model of `settings`.

    Raises:
        ModelError: As `model_identity`, and when files change during reading.
    """
    check_connector(settings.connector)
    directory = _directory(settings, config_path)
    version = Version.of(
        MODEL_ID,
        [each.resolve() for each in model_directories(settings, directory, config_path)],
        lambda: model_revision(settings, directory, config_path),
    )
    return directory, version


def load_version(
    settings: ModelSettings, model_path: Path | None, version: Version, config_path: Path | None = None
) -> "Model":
    """Load the model of `settings` and check that it is `version`, found at the study's start.

    Raises:
        ModelError, ResourceError: As `load_model`.
        ModelChangedError: When the files have changed.
    """
    return version.loaded(
        lambda: load_model(settings, model_path, version.commit, config_path),
        lambda: model_revision(settings, model_path, config_path),
    )


def engine_for(model: "Model", limits: "ServerLimits") -> "PromptEngine":
    """Return the engine of a loaded model; `limits` are those of requests to a model behind a server."""
    from mllm_shapx.models.engine import Engine
    from mllm_shapx.models.server_engine import ServerEngine
    from mllm_shapx.models.server_text import ServerModel

    if isinstance(model, ServerModel):
        return ServerEngine(model, limits)
    return Engine(model)


def _directory(settings: ModelSettings, config_path: Path) -> Path | None:
    """Return the local directory of a model, None for a hub id and for a model behind a server.

    A server that a worker starts itself may load a directory or a file.
    """
    if settings.connector == CONNECTOR:
        place = resolve_path(settings.model_id, config_path)
        return place.resolve() if settings.kwargs.server is not None and place.exists() else None
    return local_directory(settings.model_id, resolve_path(settings.model_id, config_path))


def check_connector(connector: str) -> None:
    """Check that a connector's dependencies are installed.

    Raises:
        ModelError: When they are not; the message names the extra to install.
    """
    if connector in _EXTRAS:
        need(*_EXTRAS[connector], f"connector {connector!r}")


def model_directories(
    settings: ModelSettings, directory: Path | None, config_path: Path | None = None
) -> tuple[Path, ...]:
    """Return the local directories of the model: that of `model_id`, if it has one, and the adapter's.

    Raises:
        ModelError: When one does not exist.
    """
    if settings.connector != "hf_text":
        return () if directory is None else (directory,)
    source = text_source(settings, directory, config_path)
    found = (None if place is None else place.directory for place in (source.base, source.adapter))
    return tuple(each for each in found if each is not None)


def model_revision(settings: ModelSettings, directory: Path | None, config_path: Path | None = None) -> str:
    """Return the version of the model: digests or commits (see `model_identity`)."""
    if settings.connector == "hf_text":
        return text_commit(text_source(settings, directory, config_path), settings)
    if settings.connector == CONNECTOR and settings.kwargs.server is not None:
        from mllm_shapx.models.server_process import own_server_commit

        return own_server_commit(settings, directory)
    if settings.connector == CONNECTOR:
        from mllm_shapx.models.server_identity import served_model

        return served_model(settings).commit
    return base_commit(Place(MODEL_ID, settings.model_id, directory, settings.revision))


def _with_absolute_adapter(settings: ModelSettings, config_path: Path | None) -> ModelSettings:
    written = settings.kwargs.adapter
    found = None if written is None else resolve_path(written, config_path)
    if found is None or not found.is_dir():
        return settings
    kwargs = settings.kwargs.model_copy(update={"adapter": str(found.resolve())})
    return replace(settings, kwargs=kwargs)
