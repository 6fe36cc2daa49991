"""The external encoder of the embedding similarities (config block `embedding`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.errors import ModelError
from mllm_shapx.models.pooling import pool


class TextEncoder:
    """Turns texts into vectors: the encoder's last hidden states, pooled over a text's tokens."""

    def __init__(self, config: EmbeddingConfig, tokenizer: Any, model: Any, device: str) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._model = model
        self._device = device

    @classmethod
    def load(cls, config: EmbeddingConfig) -> "TextEncoder":
        """Load the encoder.

        Raises:
            ModelError: When it is not to be had.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        options = {"revision": config.revision, "local_files_only": config.local_files_only}
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model_id, **options)
            model = AutoModel.from_pretrained(config.model_id, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"embedding.model_id: the encoder {config.model_id!r} cannot be loaded: {error}"
            ) from error
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
