"""The library's side: rows explained by mllm_shap's own runner on its own transformers backend."""

import asyncio
from pathlib import Path
from typing import Any

from mllm_shap import (
    ConversationSnapshot,
    ExplainConfig,
    ExplainRunner,
    ExplainRunOutput,
    MllmShapError,
    PluginContext,
    TransformersTextBackend,
)

from mllm_shapx.benchmark.subject import RowRun
from mllm_shapx.config.vocabulary import SIMILARITIES
from mllm_shapx.errors import ShapxError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config, flat_config, plugins
from mllm_shapx.models.chat_prompts import ChatPrompts
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.models.registry import load_model
from mllm_shapx.planning.runs import RunSpec

OTHER_PROMPTS = (
    "mllm_shap's own backend makes other prompts for this model (a second BOS, say, or another template); "
    "its runner was given those of the tokenizer's apply_chat_template"
)


class LibraryError(ShapxError):
    """The library could not explain a row; the message has the reason."""


class LibraryRunner(TransformersTextBackend):
    """Explains rows with `mllm_shap.ExplainRunner`, with itself as the backend.

    `generate` answers one prompt at a time, as in mllm_shap. The model is loaded once, at the first row. The
    prompts are the ids of the tokenizer's `apply_chat_template`. The library's own differ for some models:
    it adds the tokenizer's special tokens to a rendered template, and has no template settings.

    Args:
        run: Has the settings of the model and of its prompts.
        model_path: The model's directory; None for a hub id.
    """

    def __init__(self, run: RunSpec, model_path: Path | None) -> None:
        self._run = run
        self._model_path = model_path
        super().__init__(PluginContext(config=self._with_model(flat_config(run)), registry=plugins()))
        self._prompts: ChatPrompts | None = None
        self.makes_other_prompts = False
        """Whether the library's own prompt differed for the first conversation so far."""

    async def explain(self, game: RowRun) -> ExplainRunOutput:
        """Explain the game's row with the run's settings and seed.

        Raises:
            LibraryError: When the library refuses the config or cannot load the model.
        """
        run, row = game.run, game.row
        settings = GameSettings(run.explainer_type, run.budget, run.seed_for(row.row_index))
        config = self._with_model(explain_config(run, settings, game.num_players))
        try:
            runner = ExplainRunner(config, registry=plugins(), backend=self)
            return await runner.explain(open_row(row, run).snapshot)
        except MllmShapError as error:
            raise LibraryError(f"mllm_shap: {error}") from error

    def _with_model(self, config: ExplainConfig) -> ExplainConfig:
        """Return the config with the model's directory and its kind of attention, if the run names one."""
        model: dict[str, Any] = {"options": dict(config.backend.options)}
        if self._model_path is not None:
            model["model_id"] = str(self._model_path)
            model["options"]["revision"] = None
        if self._run.connector_kwargs.attn_implementation is not None:
            model["options"]["attn_implementation"] = self._run.connector_kwargs.attn_implementation
        return config.model_copy(update={"backend": config.backend.model_copy(update=model)})

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
        if first:
            try:
                library = super()._encode(torch, model, tokenizer, snapshot)["input_ids"][0].tolist()
            except Exception:  # noqa: BLE001 -- for example, a template that refuses the system role
                library = None
            self.makes_other_prompts = library != ids
        return {"input_ids": torch.tensor([ids], dtype=torch.long, device=self._device)}


def comparable(run: RunSpec, dtype: str) -> bool:
    """Return whether the library's values must equal ours: no draws, no batch-dependent rounding."""
    shap = run.shap
    same_score = not shap.needs_embeddings or (shap.reducer == "MeanReducer" and run.embedding is None)
    same_score &= shap.value_function is not None or SIMILARITIES[shap.similarity].library_name is not None
    same_score &= shap.reads == "answers"  # probabilities differ by the rounding of a batch
    same_texts = run.generation.is_greedy and not run.connector_kwargs.strip_reasoning
    same_texts &= shap.players != "tokens" and not run.player_rule.kept_words
    return same_texts and dtype == "float32" and same_score
