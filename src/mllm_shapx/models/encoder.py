"""The external encoder of the embedding similarities (config block `embedding`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.data.hub_access import HubError
from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import pool
from mllm_shapx.models.identity import Version, directory_digest, hub_commit

KEY = "embedding.model_id"

_WEIGHTS = ("*.safetensors", "*.bin")


class TextEncoder:
    """Turns texts into vectors: the encoder's last hidden states, pooled over a text's tokens."""

    def __init__(self, config: EmbeddingConfig, tokenizer: Any, model: Any, device: str) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._model = model
        self._device = device

    @classmethod
    def load(cls, config: EmbeddingConfig, version: Version | None = None) -> "TextEncoder":
        """Load the encoder in the version that was found when the study began; None for what there is.

        Raises:
            ModelError: When it cannot be loaded.
            ModelChangedError: When its files are others now.
        """
        found = encoder_version(config, None) if version is None else version
        return found.loaded(lambda: cls._load(config, found), lambda: directory_digest(found.directories[0]))

    @classmethod
    def _load(cls, config: EmbeddingConfig, version: Version) -> "TextEncoder":
        import torch
        from transformers import AutoModel, AutoTokenizer

        from mllm_shapx.models.devices import own_memory

        options: dict[str, Any] = {"local_files_only": config.local_files_only}
        source = config.model_id
        if version.directories:
            source = str(version.directories[0])
        else:
            options["revision"] = version.commit
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
        except Exception as error:  # the readers of configs, tokenizers and weights raise what they like
            if isinstance(error, MemoryError):
                raise
            raise ModelError(
                f"{KEY}: the encoder {config.model_id!r} cannot be loaded: "
                f"{next(iter(str(error).splitlines()), type(error).__name__)}"
            ) from error
        own_memory(model)
        if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return cls(config, tokenizer, model.to(device).eval(), device)

    def embed(self, texts: Sequence[str], reducer: str) -> list[NDArray[np.float64]]:
        """Return one vector per text; a text without tokens gives an empty vector."""
        vectors: list[NDArray[np.float64]] = []
        for start in range(0, len(texts), self._config.batch_size):
            vectors += self._embed_batch(list(texts[start : start + self._config.batch_size]), reducer)
        return vectors

    def _embed_batch(self, texts: list[str], reducer: str) -> list[NDArray[np.float64]]:
        import torch

        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._config.max_length, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            states = self._model(**encoded).last_hidden_state.float().cpu().numpy()
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        vectors = [pool(state[:length], reducer) for state, length in zip(states, lengths, strict=True)]
        if not self._config.l2_normalize:
            return vectors
        return [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in vectors]


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
