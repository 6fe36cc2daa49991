"""The library's side: rows explained by mllm_shap's own runner on its own transformers backend.

The backend gets the prompts of the tokenizer's `apply_chat_template`: for some models its own differ.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from mllm_shap import ExplainConfig, ExplainRunner, MllmShapError, PluginContext, default_registry

from mllm_shapx.benchmark.reference import ReferenceBackend
from mllm_shapx.benchmark.subject import Game, directory_of
from mllm_shapx.config.vocabulary import SIMILARITIES
from mllm_shapx.errors import ShapxError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config
from mllm_shapx.planning.runs import RunSpec


class LibraryError(ShapxError):
    """The library could not explain a row; the message has the reason."""


@dataclass(frozen=True, slots=True)
class LibraryResult:
    """The library runner's result for one row."""

    coalitions: int
    """Number of evaluated coalitions."""
    seconds: float
    values: tuple[float, ...]
    """One per player, normalized."""
    base_value: float
    grand_value: float


class LibraryRunner:
    """Explains rows with `mllm_shap.ExplainRunner`; loads its model once, at the first row.

    Args:
        run: Names the model.
        model_path: The model's directory; None for a hub id.
    """

    def __init__(self, run: RunSpec, model_path: Path | None) -> None:
        self._source = directory_of(run, model_path)
        self._is_directory = model_path is not None
        self._registry = default_registry()
        config = self._config(run, 0, 1)
        context = PluginContext(config=config, registry=self._registry)
        self._backend = ReferenceBackend(context, run, model_path)

    async def explain(self, game: Game) -> LibraryResult:
        """Explain the game's row with the run's settings and seed.

        Raises:
            LibraryError: When the library refuses the config or cannot load the model.
        """
        snapshot = open_row(game.row, game.run).snapshot
        config = self._config(game.run, game.run.seed_for(game.row.row_index), game.num_players)
        runner = ExplainRunner(config, registry=self._registry, backend=self._backend)
        started = time.perf_counter()
        try:
            output = await runner.explain(snapshot)
        except MllmShapError as error:
            raise LibraryError(f"mllm_shap: {error}") from error
        return LibraryResult(
            coalitions=output.metrics.requested,
            seconds=time.perf_counter() - started,
            values=output.result.values,
            base_value=output.result.base_value,
            grand_value=output.result.grand_value,
        )

    async def aclose(self) -> None:
        """Release the model."""
        await self._backend.aclose()

    @property
    def makes_other_prompts(self) -> bool:
        """Whether the library's unchanged backend would give the model other prompts."""
        return self._backend.makes_other_prompts

    def _config(self, run: RunSpec, seed: int, num_players: int) -> ExplainConfig:
        config = explain_config(run, GameSettings(run.explainer_type, run.budget, seed), num_players)
        options = dict(config.backend.options)
        if self._is_directory:
            options["revision"] = None
        if run.connector_kwargs.attn_implementation is not None:
            options["attn_implementation"] = run.connector_kwargs.attn_implementation
        backend = config.backend.model_copy(update={"model_id": self._source, "options": options})
        return config.model_copy(update={"backend": backend})


def comparable(run: RunSpec, dtype: str) -> bool:
    """Return whether the library's values must equal ours: no draws, no batch-dependent rounding."""
    shap = run.shap
    same_score = not shap.needs_embeddings or (shap.reducer == "MeanReducer" and run.embedding is None)
    same_score &= shap.value_function is not None or SIMILARITIES[shap.similarity].library_name is not None
    same_texts = run.generation.is_greedy and not run.connector_kwargs.strip_reasoning
    same_texts &= shap.players != "tokens" and not run.player_rule.kept_words
    same_score &= shap.reads == "answers"  # probabilities differ by the rounding of a batch
    return same_texts and dtype == "float32" and same_score
