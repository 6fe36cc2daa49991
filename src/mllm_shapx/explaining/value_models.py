"""Finds the model of a run's value function and checks that it exists, without loading it."""

import functools
from pathlib import Path
from typing import Any

from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.config.sources import ValueModel
from mllm_shapx.config.vocabulary import VALUE_FUNCTIONS
from mllm_shapx.errors import ModelChangedError
from mllm_shapx.models.identity import check_encoder, directory_digest, encoder_version
from mllm_shapx.planning.runs import RunSpec


def value_model(run: RunSpec, config_path: Path | None) -> ValueModel | None:
    """Return the model of a run's value function: directory and digest, or hub id and commit.

    A relative directory is looked up in the working directory, then in the config's folder.

    Raises:
        ModelError: When the directory or hub repository does not exist or is not a model.
    """
    found = _named(run)
    if found is None:
        return None
    key, config = found
    version = encoder_version(config, config_path, key)
    source = str(version.directories[0]) if version.directories else config.model_id
    return ValueModel(source, version.commit, is_directory=bool(version.directories))


def check_value_model(run: RunSpec, config_path: Path) -> str | None:
    """Check that the model of a run's value function exists, without reading a directory's files.

    Returns:
        A warning when the hub is unreachable.

    Raises:
        ModelError: When the directory or hub repository does not exist or is not a model.
    """
    found = _named(run)
    return None if found is None else check_encoder(found[1], config_path, found[0])


@functools.lru_cache(maxsize=16)
def refuse_changed(model: ValueModel) -> None:
    """Refuse a directory whose files changed since the study's start; checked once per process.

    Raises:
        ModelChangedError: Names the directory.
    """
    if model.is_directory and directory_digest(Path(model.source)) != model.commit:
        raise ModelChangedError(
            f"shap.value_options: the files in {model.source} are not the ones that the study began with: "
            "something has written to them since. Put the old files back and go on with --resume"
        )


def _named(run: RunSpec) -> tuple[str, EmbeddingConfig] | None:
    """Return the config key and the model of a value function; the default is the library's."""
    name = run.shap.value_function
    key = None if name is None else VALUE_FUNCTIONS[name].model_option
    if name is None or key is None:
        return None
    options = {**_defaults(name), **(run.shap.value_options or {})}
    config = EmbeddingConfig(model_id=str(options[key]), revision=str(options["revision"]))
    return f"shap.value_options.{key}", config


def _defaults(name: str) -> dict[str, Any]:
    from mllm_shap import PluginGroup
    from mllm_shap.plugins.builtin import BUILTIN_PLUGINS

    options: Any = BUILTIN_PLUGINS[PluginGroup.VALUE_FNS][name]
    return {key: field.default for key, field in options.options_model.model_fields.items()}
