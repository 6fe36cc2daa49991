"""The sweep: an experiment set's variants expanded into concrete, named runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from mllm_shapx.config.findings import dotted, walk
from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.measures import FaithfulnessConfig
from mllm_shapx.config.models import EmbeddingConfig, ExperimentSet
from mllm_shapx.config.scoring import EmbeddingBlock
from mllm_shapx.config.sources import TokenizerSource
from mllm_shapx.config.values import canonical_type
from mllm_shapx.config.variants import HierarchicalConfig, Variant
from mllm_shapx.config.vocabulary import CONNECTORS, EXPLAINERS, ShapleyType
from mllm_shapx.errors import ConfigError, Problem
from mllm_shapx.planning.players import PlayerRule
from mllm_shapx.planning.precision import rounding_warnings
from mllm_shapx.planning.runs import Budget, HierarchicalSpec, RunSpec, blocks_in_words
from mllm_shapx.records.layout import name_fault

MOST_RUNS = 10_000
"""Most runs of one experiment set; lists of budgets multiply."""


_LABELS = {"num_samples": "ns", "fraction": "frac", "linear": "lin"}
"""Kind of a budget -> its word in a run's name."""
_GRID = (
    "ks", "importance_min_fractions", "shap_num_samples", "shap_fractions", "first_layer_num_samples",
    "first_layer_fractions",
)  # fmt: skip
"""Lists of a `hierarchical` block: each combination of their values is a run."""


@dataclass(frozen=True)
class Sweep:
    """The runs of an experiment set."""

    runs: tuple[RunSpec, ...]
    """In config order, each name once."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """One point of a variant's grid: the end of the run's name, and its budgets."""

    name: str
    budget: Budget
    written: dict[str, Any]
    """The budget in the config's words."""
    hierarchical: HierarchicalSpec | None = None
    seed: int | None = None


def expand(experiment_set: ExperimentSet, source: str | None = None) -> Sweep:
    """Return the runs of `experiment_set`, named as in docs/formats.md ("Run names").

    `num_samples` -1 (the estimator's floor) is written `ns-1`. Repeated runs with the same settings are kept
    once, with a warning.

    A hierarchical variant is the grid of ks, importance_min_fractions and the budgets of the lower games
    and of the first layer. Where both num_samples and fractions are listed, num_samples decides and the
    name shows both. The default budget is every coalition for an `exact` game and the estimator's floor for
    others; a first layer without a budget takes that of the lower games, if given.

    `source` is the file that errors name; the experiment set's id when None.

    Raises:
        ConfigError: When two runs of one name have different settings, a run has a reserved name, a variant
            lacks a setting that its explainer needs, or there are too many runs.
    """
    runs: dict[str, RunSpec] = {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    warnings: list[str] = []
    tokenizer = tokenizer_source(experiment_set, None if source is None else Path(source))
    _refuse_too_many(experiment_set.experiments, source or experiment_set.experiment_set_id)
    for index, variant in enumerate(experiment_set.experiments):
        path = f"experiments[{index}]"
        entries = list(_entries(variant))
        if not entries:
            lacking = "a hierarchical block" if variant.explainer_type == "hierarchical" else "a budget"
            problems.append(Problem(path, f'explainer "{variant.explainer_type}" needs {lacking}'))
        for run in _runs(experiment_set, variant, entries, tokenizer):
            first = runs.setdefault(run.name, run)
            origin = origins.setdefault(run.name, path)
            fault = name_fault(run.name)
            if fault is not None:
                problems.append(Problem(f"{path}.name", fault, "give the variant another name"))
            elif first is not run and first.result_settings == run.result_settings:
                warnings.append(f'{path}: run "{run.name}" is already in {origin}; it is run once')
            elif first is not run:
                problems.append(_clash(path, origin, first, run))
    if problems:
        raise ConfigError(source or experiment_set.experiment_set_id, problems)
    warnings += rounding_warnings(tuple(runs.values()))
    return Sweep(tuple(runs.values()), tuple(warnings))


def _refuse_too_many(variants: Sequence[Variant], source: str) -> None:
    """Refuse a sweep that would take minutes to expand."""
    counts = [_count(variant) for variant in variants]
    if sum(counts) > MOST_RUNS:
        largest = max(range(len(counts)), key=counts.__getitem__)
        message = f"{sum(counts):,} runs are too many: at most {MOST_RUNS:,} in one config"
        fix = f"experiments[{largest}] makes {counts[largest]:,} of them: shorten its lists"
        raise ConfigError(source, [Problem("experiments", message, fix)])


def _count(variant: Variant) -> int:
    """Return the number of a variant's runs, without expanding them."""
    if variant.explainer_type == "hierarchical" and variant.hierarchical is not None:
        budgets = prod(len(values) for values in _grid(variant.hierarchical))
    else:
        budgets = len(variant.num_samples) + len(variant.fractions) + len(variant.linear)
    return max(1, budgets) * max(1, len(variant.all_seeds))


def _clash(path: str, origin: str, first: RunSpec, second: RunSpec) -> Problem:
    old, new = _flat(first.result_settings), _flat(second.result_settings)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = ", ".join(f"{key} ({old.get(key)} and {new.get(key)})" for key in keys)
    message = f'run "{first.name}" is also made by {origin}, with other settings: {shown}'
    return Problem(path, message, 'give one of the two variants a "name"')


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value; a list is one value."""
    return {
        dotted(place): value
        for place, value in walk(settings)
        if not isinstance(value, dict) and not any(isinstance(part, int) for part in place)
    }


def tokenizer_source(experiment_set: ExperimentSet, config_path: Path | None) -> TokenizerSource | None:
    """Return the source of the model's tokenizer; None for a model behind a server or with audio output."""
    if not CONNECTORS[experiment_set.connector].has_tokenizer:
        return None
    kwargs, written = experiment_set.connector_kwargs, experiment_set.model_id
    path = resolve_path(written, config_path)
    model = str(path.resolve()) if path.is_dir() else written
    return TokenizerSource(model, experiment_set.model_revision, kwargs.gguf_file, kwargs.trust_remote_code)


def player_rule(experiment_set: ExperimentSet, config_path: Path | None) -> PlayerRule:
    """Return the player rule of the config, which the row selection uses."""
    return PlayerRule.of(
        experiment_set.shap, experiment_set.chat, tokenizer_source(experiment_set, config_path)
    )


def _runs(
    experiment_set: ExperimentSet,
    variant: Variant,
    entries: Sequence[_Entry],
    tokenizer: TokenizerSource | None,
) -> Iterator[RunSpec]:
    shap = experiment_set.shap.changed_by(variant.shap_override)
    has_own = "faithfulness" in variant.model_fields_set
    faithfulness = variant.faithfulness if has_own else experiment_set.faithfulness
    for entry in entries:
        yield RunSpec(
            name=entry.name,
            explainer_type=variant.explainer_type,
            budget=entry.budget,
            hierarchical=entry.hierarchical,
            connector=experiment_set.connector,
            model_id=experiment_set.model_id,
            model_revision=experiment_set.model_revision,
            connector_kwargs=experiment_set.connector_kwargs,
            device=experiment_set.device,
            dataset=experiment_set.dataset,
            modality=experiment_set.modality,
            generation=experiment_set.generation.changed_by(variant.generation_override),
            chat=experiment_set.chat,
            audio_segmentation=experiment_set.audio_segmentation,
            shap=shap,
            embedding=_encoder(experiment_set, variant) if shap.needs_embeddings else None,
            tokenizer=tokenizer,
            faithfulness=faithfulness,
            interactions=variant.interactions,
            stop_when=variant.stop_when,
            seed=entry.seed,
            variant=_in_words(variant, entry, faithfulness),
        )


def _in_words(variant: Variant, entry: _Entry, faithfulness: FaithfulnessConfig | None) -> dict[str, Any]:
    """Return an entry of `experiments` that expands to one run only; its blocks contain the overrides."""
    return {
        "explainer_type": variant.explainer_type,
        "name": variant.name,
        "num_samples": None,
        "fraction": None,
        "linear": None,
        "hierarchical": None,
        **entry.written,
        **({} if entry.seed is None else {"seeds": [entry.seed]}),
        **blocks_in_words(
            faithfulness=faithfulness, interactions=variant.interactions, stop_when=variant.stop_when
        ),
    }


def _encoder(experiment_set: ExperimentSet, variant: Variant) -> EmbeddingConfig | None:
    """Return the external encoder of a variant's runs, None for the explained model's own states."""
    block = (experiment_set.embedding or EmbeddingBlock()).changed_by(variant.embedding_override)
    return None if block.model_id is None else EmbeddingConfig(**block.model_dump())


def _entries(variant: Variant) -> Iterator[_Entry]:
    stop = "" if variant.stop_when is None else _label("se", variant.stop_when.standard_error)
    for entry in _budgets(variant):
        for seed in variant.all_seeds or (None,):
            yield replace(entry, name=f"{entry.name}{stop}{_label('seed', seed)}", seed=seed)


def _budgets(variant: Variant) -> Iterator[_Entry]:
    prefix = f"{variant.name}_" if variant.name else ""
    kind = variant.explainer_type
    if kind == "hierarchical":
        if variant.hierarchical is not None:
            yield from _hierarchical_entries(prefix, variant.hierarchical)
    elif not EXPLAINERS[kind].takes_budget:
        yield _Entry(variant.name or kind, Budget("all"), {})
    else:
        budgets = [Budget("num_samples", count) for count in variant.num_samples]
        budgets += [Budget("fraction", fraction) for fraction in variant.fractions]
        budgets += [Budget("linear", factor) for factor in variant.linear]
        for budget in budgets:
            label = _label(_LABELS[budget.kind], budget.value)
            yield _Entry(f"{prefix}{kind}{label}", budget, {budget.kind: budget.value})


def _grid(block: HierarchicalConfig) -> list[Sequence[Any]]:
    """Return the lists whose product is the block's runs; None for a budget that is not given."""
    return [getattr(block, key) or (None,) for key in _GRID]


def _hierarchical_entries(prefix: str, block: HierarchicalConfig) -> Iterator[_Entry]:
    inner: ShapleyType = canonical_type(block.shap_type)
    first_layer: ShapleyType = canonical_type(block.first_layer_type or inner)
    first_label = f"_fl{block.first_layer_type}" if block.first_layer_type else ""
    for point in product(*_grid(block)):
        k, least, count, fraction, first_count, first_fraction = point
        inner_budget = _game_budget(inner, count, fraction)
        lower = None if inner == "exact" else inner_budget
        spec = HierarchicalSpec(
            k=k,
            inner_type=inner,
            inner_budget=inner_budget,
            first_layer_type=first_layer,
            first_layer_budget=_game_budget(first_layer, first_count, first_fraction, lower),
            use_importance_sampling=block.use_importance_sampling,
            importance_min_fraction=least,
        )
        name = (
            f"{prefix}hier_{block.shap_type.lower()}_k{k}{_label('imp', least)}{first_label}"
            f"{_label('ns', count)}{_label('frac', fraction)}"
            f"{_label('flns', first_count)}{_label('flfrac', first_fraction)}"
        )
        of_this_run = {
            key: () if value is None else (value,) for key, value in zip(_GRID, point, strict=True)
        }
        written = block.model_copy(update=of_this_run).model_dump(mode="json")
        yield _Entry(name, spec.first_layer_budget, {"hierarchical": written}, spec)


def _game_budget(
    kind: ShapleyType, count: int | None, fraction: float | None, default: Budget | None = None
) -> Budget:
    if kind == "exact":
        return Budget("all")
    if count is not None:
        return Budget("num_samples", count)
    if fraction is not None:
        return Budget("fraction", fraction)
    return default or Budget("num_samples", -1)


def _label(word: str, value: float | None) -> str:
    """Return a part of a run's name, such as `_frac0_5`; empty without a value."""
    return "" if value is None else f"_{word}{str(value).replace('.', '_')}"
