"""A run's words into mllm_shap's: the one place where the config meets the library's settings."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from mllm_shap import ExplainConfig, PluginContext, PluginGroup, PluginRegistry, default_registry

from mllm_shapx.models.base import Decoding
from mllm_shapx.planning.runs import Budget, RunSpec

_ESTIMATORS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "limited_mc": {"estimator": "mc", "include_minimal_masks": True},
    "standard_mc": {"estimator": "mc", "include_minimal_masks": False},
    "limited_cc": {"estimator": "complementary", "include_minimal_masks": True},
    "standard_cc": {"estimator": "complementary", "include_minimal_masks": False},
    "limited_neyman": {"estimator": "neyman_cc", "neyman": {"use_standard_method": False}},
    "standard_neyman": {"estimator": "neyman_cc", "neyman": {"use_standard_method": True}},
}
"""explainer_type -> the library's estimator settings (docs/formats.md)."""

_NORMALIZERS = {
    "AbsSumNormalizer": "abs_sum",
    "IdentityNormalizer": "identity",
    "MinMaxNormalizer": "min_max",
    "PowerShiftNormalizer": "power_shift",
}


@dataclass(frozen=True, slots=True)
class GameSettings:
    """How one cooperative game is sampled."""

    explainer_type: str
    """Any type but `hierarchical`."""
    budget: Budget
    seed: int


def decoding(run: RunSpec) -> Decoding:
    """Return how the run's answers are decoded."""
    generation = run.generation
    return Decoding(
        max_new_tokens=generation.max_new_tokens,
        text_temperature=generation.text_temperature,
        text_top_k=generation.text_top_k,
        audio_temperature=generation.audio_temperature,
        audio_top_k=generation.audio_top_k,
        output_modality=run.modality.output_modality,
        assistant_prefill=run.chat.assistant_prefill,
    )


def answer_seed(run: RunSpec, row_index: int, mask: int) -> int:
    """Return the seed of one coalition's draws: it hangs on the generation key, the row and the coalition."""
    digest = hashlib.sha256(f"{run.generation_key}\0{row_index}\0{mask:x}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def explain_config(run: RunSpec, game: GameSettings, num_players: int) -> ExplainConfig:
    """Return the library's config of one game of `run` on `num_players` players.

    `mllm_shap.ExplainRunner` run with it on the same row gives the same values.
    """
    evaluations = game.budget.evaluations(num_players)
    budget = {"fraction": game.budget.fraction} if evaluations is None else {"evaluations": evaluations}
    if game.explainer_type == "exact":
        budget = {"fraction": 1.0}
    dtype = run.connector_kwargs.dtype
    return ExplainConfig.model_validate(
        {
            "backend": {
                "kind": "transformers",
                "model_id": run.model_id,
                "options": {"revision": run.model_revision, "dtype": dtype},
            },
            "generation": {
                "max_new_tokens": run.generation.max_new_tokens,
                "temperature": run.generation.text_temperature,
                "top_k": run.generation.text_top_k or 0,
            },
            "explanation": {
                **_ESTIMATORS[game.explainer_type],
                "value_fn": "tfidf_cosine" if not run.shap.needs_embeddings else "embedding_cosine",
                "normalizer": _NORMALIZERS[run.shap.normalizer],
                "players": "tokens",
                "absence_policy": "delete",
                "budget": budget,
                "embedding_mode": run.shap.mode.lower(),
                "seed": game.seed,
                "archive": {"path": ""},
                "plugin_options": _plugin_options(run),
            },
        }
    )


def _plugin_options(run: RunSpec) -> dict[str, dict[str, object]]:
    options: dict[str, dict[str, object]] = {"tokens": {"roles": ["user"]}}
    if run.shap.needs_embeddings:
        options["embedding_cosine"] = {"encoder": "model_states"}
    return options


def resolve(config: ExplainConfig, group: PluginGroup, name: str) -> Any:
    """Build one of the library's plugins for `config`."""
    registry = plugins()
    return registry.resolve(group, name, PluginContext(config=config, registry=registry))


@functools.cache
def plugins() -> PluginRegistry:
    """Return the library's plugins and the installed ones; looking for them takes a moment, once."""
    return default_registry()
