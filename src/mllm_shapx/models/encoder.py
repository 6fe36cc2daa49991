"""The external encoder of the embedding similarities (config block `embedding`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import pool
from mllm_shapx.models.identity import ENCODER, Version, directory_digest, encoder_version


class TextEncoder:
    """Turns texts into vectors: the encoder's last hidden states, pooled over the tokens of each text."""

    def __init__(self, config: EmbeddingConfig, tokenizer: Any, model: Any, device: str) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._model = model
        self._device = device

    @classmethod
    def load(cls, config: EmbeddingConfig, version: Version | None = None) -> "TextEncoder":
        """Load the encoder and check that it is `version`, found at the study's start; None checks nothing.

        Raises:
            ModelError: When it cannot be loaded.
            ModelChangedError: When its files have changed.
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
        except Exception as error:  # readers of configs, tokenizers and weights raise many types
            if isinstance(error, MemoryError):
                raise
            raise ModelError(
                f"{ENCODER}: the encoder {config.model_id!r} cannot be loaded: "
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
