"""Converts a run's settings to mllm_shap's config; no other module builds it."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from mllm_shap import ExplainConfig, PluginContext, PluginGroup, PluginRegistry, default_registry

from mllm_shapx.config.vocabulary import ABSENCE_OPTIONS, EXPLAINERS, SIMILARITIES, VALUE_FUNCTIONS
from mllm_shapx.models.base import Decoding
from mllm_shapx.planning.runs import Budget, RunSpec

_NORMALIZERS = {
    "AbsSumNormalizer": "abs_sum",
    "IdentityNormalizer": "identity",
    "MinMaxNormalizer": "min_max",
    "PowerShiftNormalizer": "power_shift",
}


_PARTITIONS = {"words": "tokens", "tokens": "tokens", "sentences": "sentences", "messages": "messages"}
"""Kind of player -> the library's partition; the library has none for a model's own tokens."""


@dataclass(frozen=True, slots=True)
class GameSettings:
    """How one cooperative game is sampled."""

    explainer_type: str
    """Any type but `hierarchical`."""
    budget: Budget
    seed: int
    stop_at: float | None = None
    """Standard error at which sampling ends before the budget is spent; None spends it all."""


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
        logprobs=run.shap.reads == "log_probabilities",
    )


def answer_seed(run: RunSpec, row_index: int, mask: int) -> int:
    """Return the seed of one coalition's draws; depends on the generation key, the row and the coalition."""
    digest = hashlib.sha256(f"{run.generation_key}\0{row_index}\0{mask:x}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def flat_config(run: RunSpec) -> ExplainConfig:
    """Return the library's config of `run`, for plugins that do not depend on the game's sampling."""
    return explain_config(run, GameSettings("exact", Budget("all"), 0), 1)


def explain_config(run: RunSpec, game: GameSettings, num_players: int) -> ExplainConfig:
    """Return the library's config of one game of `run` on `num_players` players.

    `mllm_shap.ExplainRunner` with this config gives the same values for the same row, but for similarities
    that the library does not have.
    """
    facts = EXPLAINERS[game.explainer_type]
    evaluations = game.budget.evaluations(num_players)
    budget = {"fraction": game.budget.fraction} if evaluations is None else {"evaluations": evaluations}
    if not facts.takes_budget and facts.estimator != "exact":
        # The library refuses a share if all 2^n coalitions are too many.
        budget = {"evaluations": facts.least(num_players)}
    dtype, shap = run.connector_kwargs.dtype, run.shap
    value_fn = shap.value_function or SIMILARITIES[shap.similarity].library_name
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
                "estimator": facts.estimator,
                "estimand": facts.estimand,
                **facts.settings,
                "value_fn": value_fn or "embedding_cosine",
                "normalizer": _NORMALIZERS[shap.normalizer],
                "players": _PARTITIONS[shap.players],
                "absence_policy": shap.absence,
                "budget": budget,
                "embedding_mode": shap.mode.lower(),
                "seed": game.seed,
                "archive": {"path": ""},
                "plugin_options": _plugin_options(run),
            },
        }
    )


def _plugin_options(run: RunSpec) -> dict[str, dict[str, object]]:
    options: dict[str, dict[str, object]] = {
        _PARTITIONS[run.shap.players]: {"roles": list(run.player_rule.roles)}
    }
    option = ABSENCE_OPTIONS[run.shap.absence]
    if option is not None and run.shap.absence_text is not None:
        options[run.shap.absence] = {option: run.shap.absence_text}
    if run.shap.needs_embeddings:
        options["embedding_cosine"] = {"encoder": "model_states"}
    if run.shap.value_function is not None:
        options[run.shap.value_function] = dict(run.shap.value_options or {}) | _value_model(run)
    return options


def _value_model(run: RunSpec) -> dict[str, object]:
    """Return the options for the value function's model, if known: its location and commit."""
    name, model = run.shap.value_function, run.value_model
    key = None if name is None else VALUE_FUNCTIONS[name].model_option
    if key is None or model is None:
        return {}
    return {key: model.source} if model.is_directory else {key: model.source, "revision": model.commit}


def resolve(config: ExplainConfig, group: PluginGroup, name: str) -> Any:
    """Build one of the library's plugins for `config`."""
    registry = plugins()
    return registry.resolve(group, name, PluginContext(config=config, registry=registry))


@functools.cache
def plugins() -> PluginRegistry:
    """Return the library's plugins and installed ones. Cached, because searching entry points is slow."""
    return default_registry()
