"""Which external encoder a config names, and that there is one, without loading it."""

from pathlib import Path

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.data.hub_access import HubError
from mllm_shapx.errors import ModelError
from mllm_shapx.models.identity import directory_digest, hub_commit
from mllm_shapx.models.steadiness import Version

KEY = "embedding.model_id"

_WEIGHTS = ("*.safetensors", "*.bin")


def encoder_version(config: EmbeddingConfig, config_path: Path | None, key: str = KEY) -> Version:
    """Return the version of an encoder: digest of its directory, or hub commit.

    A relative directory is looked for from the working directory, then from the config's folder.

    Raises:
        ModelError: When there is no such directory or hub repository, or it is no model.
    """
    directory = _directory(config.model_id, resolve_path(config.model_id, config_path), key)
    if directory is not None:
        return Version.of(key, (directory.resolve(),), lambda: directory_digest(directory))
    if config.local_files_only:
        return Version(key, (), _cached(config))
    return Version(key, (), hub_commit(config.model_id, config.revision, key))


def check_encoder(config: EmbeddingConfig, config_path: Path, key: str = KEY) -> str | None:
    """Look whether an encoder exists, without reading a directory's files.

    Returns:
        A warning when the hub that would know cannot be asked.

    Raises:
        ModelError: When there is no such directory or hub repository, or it is no model.
    """
    if _directory(config.model_id, resolve_path(config.model_id, config_path), key) is not None:
        return None
    try:
        encoder_version(config, config_path, key)
    except ModelError as error:
        if not (isinstance(error.__cause__, HubError) and error.__cause__.problem == "unreachable"):
            raise
        return f"not checked: {error}"
    return None


def _directory(written: str, candidate: Path, key: str) -> Path | None:
    """Return the directory that a config key names, None for a hub id."""
    if not candidate.exists():
        if written.startswith(("/", "./", "../", "~")) or written.count("/") > 1:
            raise ModelError(
                f"{key}: there is no directory {written!r} (looked at {candidate}); name one, or a hub id "
                "such as 'sentence-transformers/all-MiniLM-L6-v2'"
            )
        return None
    missing = [] if (candidate / "config.json").is_file() else ["config.json"]
    if not any(next(candidate.glob(pattern), None) for pattern in _WEIGHTS):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ModelError(f"{key}: {written!r} is no encoder, for lack of {' and '.join(missing)}")
    return candidate


def _cached(config: EmbeddingConfig) -> str:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.model_id, "config.json", revision=config.revision)
    if isinstance(cached, str):
        return Path(cached).parent.name
    raise ModelError(
        f"{KEY}: {config.model_id!r} is neither a directory nor in the local hub cache, and "
        "embedding.local_files_only forbids to ask the hub; download it once, or correct the name"
    )
