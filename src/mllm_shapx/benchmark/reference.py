"""mllm_shap's own transformers backend, with the prompts of the model's chat template."""

import asyncio
from pathlib import Path
from typing import Any

from mllm_shap import ConversationSnapshot, PluginContext, TransformersTextBackend

from mllm_shapx.models.chat_prompts import ChatPrompts
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.models.registry import load_model
from mllm_shapx.planning.runs import RunSpec

OTHER_PROMPTS = (
    "mllm_shap's own backend makes other prompts for this model (a second BOS, say, or another template); "
    "its runner was given those of the tokenizer's apply_chat_template"
)


class ReferenceBackend(TransformersTextBackend):
    """Answers one prompt at a time with `generate`, as mllm_shap does, on the ids of `apply_chat_template`.

    The library adds the tokenizer's special tokens to a rendered template, and has no template settings. If
    neither matters, the prompts equal the library's own.

    Args:
        context: The library's config of the model.
        run: Has the settings of the prompts.
        model_path: The model's directory; None for a hub id.
    """

    def __init__(self, context: PluginContext, run: RunSpec, model_path: Path | None) -> None:
        super().__init__(context)
        self._run = run
        self._model_path = model_path
        self._prompts: ChatPrompts | None = None
        self.makes_other_prompts = False
        """Whether the library's own prompt differed for the first conversation so far."""

    async def _ensure_loaded(self) -> None:
        if not self._run.connector_kwargs.loading_settings:
            await super()._ensure_loaded()
            return
        async with self._init_lock:
            if self._model is None:
                await asyncio.to_thread(self._load_as_we_do)

    def _load_as_we_do(self) -> None:
        """Load the parts that the library has no setting for."""
        loaded = load_model(self._run.model_settings, self._model_path)
        if not isinstance(loaded, HfTextModel):
            msg = f"connector {self._run.connector!r} has no backend of transformers"
            raise TypeError(msg)
        self._tokenizer, self._model = loaded.tokenizer, loaded.network
        self._device = loaded.network.device

    def _encode(
        self, torch: Any, model: Any, tokenizer: Any, snapshot: ConversationSnapshot
    ) -> dict[str, Any]:
        first = self._prompts is None
        if self._prompts is None:
            self._prompts = ChatPrompts(tokenizer, self._run.model_settings)
        ids = self._prompts.encode_all([snapshot], self._run.chat.assistant_prefill or "")[0]
        inputs = {"input_ids": torch.tensor([ids], dtype=torch.long, device=self._device)}
        if first:
            self.makes_other_prompts = self._librarys_ids(torch, model, tokenizer, snapshot) != ids
        return inputs

    def _librarys_ids(
        self, torch: Any, model: Any, tokenizer: Any, snapshot: ConversationSnapshot
    ) -> list[int] | None:
        try:
            encoded = super()._encode(torch, model, tokenizer, snapshot)
        except Exception:  # noqa: BLE001 -- for example, a template that refuses the system role
            return None
        ids: list[int] = encoded["input_ids"][0].tolist()
        return ids
