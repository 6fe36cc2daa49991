"""Checks across keys of a config: problems and warnings."""

import os
import re
from dataclasses import replace

from mllm_shapx.config import servers, vocabulary_checks
from mllm_shapx.config.findings import Findings, problem, walk, warning
from mllm_shapx.config.models import DatasetConfig, ExperimentSet, RowFilter
from mllm_shapx.config.values import canonical_type
from mllm_shapx.config.variants import HierarchicalConfig, Variant
from mllm_shapx.config.vocabulary import CONNECTORS, EXPLAINERS, KNOWN_SUBSETS

_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNPINNED = "ALLOW_UNPINNED_HF_DOWNLOAD"
_NOT_FOR_TEMPLATES = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
"""Arguments of `apply_chat_template` that we set ourselves."""


def findings(experiment_set: ExperimentSet) -> Findings:
    """Yield all problems and warnings across keys; assumes well-formed keys."""
    yield from _modality(experiment_set)
    yield from _prompts(experiment_set)
    yield from _loading(experiment_set)
    yield from _server(experiment_set)
    yield from _secrets(experiment_set)
    yield from _dataset(experiment_set.dataset)
    yield from _selection(experiment_set)
    yield from _scoring(experiment_set)
    yield from vocabulary_checks.problems(experiment_set)
    if experiment_set.runtime.n_generator_jobs is not None:
        message = "has no effect: the number of workers is the command line's"
        yield warning("runtime.n_generator_jobs", message, "use --num-workers or --workers-per-gpu")
    for index, variant in enumerate(experiment_set.experiments):
        yield from _variant(f"experiments[{index}]", variant)
        yield from _seeds(f"experiments[{index}]", variant, experiment_set)


def _modality(experiment_set: ExperimentSet) -> Findings:
    modality, connector = experiment_set.modality, experiment_set.connector
    for key in ("input_modality", "output_modality"):
        value = getattr(modality, key)
        if value != "text" and not CONNECTORS[connector].has_audio:
            message = f'connector "{connector}" takes text only, not "{value}"'
            fix = 'write "text", or use connector "liquid_audio"'
            yield problem(f"modality.{key}", message, fix, "connector")
    if experiment_set.audio_segmentation.method == "sgpa" and not modality.has_audio_input:
        message = '"sgpa" cuts recordings into players, and the input is text'
        fix = 'remove it, or set modality.input_modality to "audio__..."'
        yield problem("audio_segmentation.method", message, fix, "modality.input_modality")


def _prompts(experiment_set: ExperimentSet) -> Findings:
    """Yield problems with the settings of prompts and of the answers' texts."""
    kwargs, shap = experiment_set.connector_kwargs, experiment_set.shap
    variables = "connector_kwargs.chat_template_kwargs"
    given = kwargs.chat_template_kwargs or {}
    for key in given:
        if key in _NOT_FOR_TEMPLATES:
            message = (
                "is no variable of a chat template: the prompt is always rendered and tokenized in one way"
            )
            yield problem(f"{variables}.{key}", message, "remove it")
    if given.get("sanitize_control_tokens") and experiment_set.chat.assistant_prefill:
        message = "cannot be had with an assistant_prefill, which transformers does not sanitize"
        key, fix = "sanitize_control_tokens", "remove one of the two"
        yield problem(f"{variables}.{key}", message, fix, "chat.assistant_prefill")
    if kwargs.strip_reasoning and experiment_set.embedding is None and shap.needs_embeddings:
        message = (
            f"{shap.similarity} compares the model's own states, and these cover an answer's reasoning too"
        )
        fix = "use TfIdfCosineSimilarity, or name an encoder in embedding.model_id"
        yield warning("connector_kwargs.strip_reasoning", message, fix)


def _loading(experiment_set: ExperimentSet) -> Findings:
    """Yield problems with keys of the model that the connector does not read, or that exclude each other."""
    kwargs, connector = experiment_set.connector_kwargs, experiment_set.connector
    for key in type(kwargs).model_fields:
        readers = [f'"{name}"' for name, facts in CONNECTORS.items() if key in facts.own_keys]
        is_set = getattr(kwargs, key) not in (None, False, {})
        if is_set and readers and key not in CONNECTORS[connector].own_keys:
            kind = "connector" if len(readers) == 1 else "connectors"
            message = f'is read by {kind} {" and ".join(readers)} alone, not by "{connector}"'
            yield problem(f"connector_kwargs.{key}", message, "remove it", "connector")
    for key in kwargs.loading_settings:
        if connector != "hf_text" and key != "server":
            message = f'is not known to connector "{connector}"'
            yield problem(f"connector_kwargs.{key}", message, "remove it", "connector")
    place = "connector_kwargs.quantization"
    if kwargs.quantization is not None and experiment_set.device in {"cpu", "mps"}:
        message = (
            f'"{kwargs.quantization}" needs CUDA (bitsandbytes), and device is "{experiment_set.device}"'
        )
        yield problem(place, message, "", "device")
    if kwargs.quantization is not None and kwargs.gguf_file is not None:
        message = "is not read for a GGUF file, whose weights are unpacked"
        yield problem(place, message, "remove one of the two", "connector_kwargs.gguf_file")


def _server(experiment_set: ExperimentSet) -> Findings:
    """Yield problems with the keys of a model behind a server."""
    kwargs = experiment_set.connector_kwargs
    if experiment_set.connector != servers.CONNECTOR:
        return
    place, server = "connector_kwargs.base_url", "connector_kwargs.server"
    if kwargs.base_url is not None and kwargs.server is not None:
        message = "cannot stand beside connector_kwargs.server, whose address is chosen when it starts"
        yield problem(place, message, "remove one of the two", "connector")
    if kwargs.base_url is None and kwargs.server is None:
        fix = f"such as http://localhost:8000/v1; LM Studio's is {servers.LM_STUDIO_URL}"
        yield problem(place, "is the address of the server, and is required", fix, "connector", server)
    if kwargs.model_id is None:
        message = "is required: the name that the server knows the model by"
        yield problem("connector_kwargs.model_id", message, "GET base_url/models lists them", "connector")
    if experiment_set.chat.assistant_prefill:
        message = "cannot be sent to a server, which begins every answer itself"
        yield problem("chat.assistant_prefill", message, "remove it", "connector")
    for key in ("revision", "attn_implementation", "dtype", "batch_size"):
        if getattr(kwargs, key) not in {None, "auto"}:
            yield warning(f"connector_kwargs.{key}", "is not read: the server decides it", "remove it")
    yield from _states(experiment_set)


def _states(experiment_set: ExperimentSet) -> Findings:
    """Yield the runs that compare a model's states when these are not available."""
    shap, embedding = experiment_set.shap, experiment_set.embedding
    for index, variant in enumerate(experiment_set.experiments):
        changed, encoder = variant.shap_override, variant.embedding_override
        scoring = shap.changed_by(changed)
        has_encoder = (embedding and embedding.model_id) or (encoder and encoder.model_id)
        if not scoring.needs_embeddings or has_encoder:
            continue
        is_own = changed is not None and "similarity" in changed.model_fields_set
        place = f"experiments[{index}].shap_override.similarity" if is_own else "shap.similarity"
        message = f'"{scoring.similarity}" compares the model\'s own states, which a server does not give'
        fix = "name an encoder in embedding.model_id, or use TfIdfCosineSimilarity"
        yield problem(place, message, fix, "connector", "shap.similarity", "embedding")
        if not is_own:
            return


def _secrets(experiment_set: ExperimentSet) -> Findings:
    """Yield the places of texts that look like API keys, without the texts."""
    message = "holds what looks like an API key, and configs are copied into the results"
    fix = "remove it, revoke the key, and name a variable in connector_kwargs.api_key_env"
    for place, value in walk(experiment_set.model_dump(mode="json")):
        if isinstance(value, str) and servers.looks_like_key(value):
            yield problem(place, message, fix)


def _dataset(dataset: DatasetConfig) -> Findings:
    if dataset.is_local and not dataset.path:
        message = f'source "{dataset.source}" needs a path: a file, a directory or a glob'
        yield problem("dataset.path", message, "", "dataset.source")
    if dataset.is_local:
        return
    if dataset.path:
        yield warning("dataset.path", f'is not read by source "{dataset.source}"', "remove it")
    revision = dataset.revision
    if revision is not None and not _COMMIT.fullmatch(revision) and os.environ.get(_UNPINNED) != "1":
        message = f'"{revision}" is no commit (40 hex digits), so the rows may change under the study'
        fix = f"pin the commit, or set {_UNPINNED}=1; the commit that was used is recorded"
        yield problem("dataset.revision", message, fix, "dataset.source")
    is_default = dataset.repo_id == DatasetConfig.model_fields["repo_id"].default
    if is_default and dataset.subset not in KNOWN_SUBSETS:
        message = f'"{dataset.subset}" is none of the subsets known here'
        yield warning("dataset.subset", message, "known: " + ", ".join(sorted(KNOWN_SUBSETS)))
    if dataset.trust_remote_code:
        message = "has no effect: the datasets library runs no remote code any more"
        yield warning("dataset.trust_remote_code", message)


def _selection(experiment_set: ExperimentSet) -> Findings:
    selection = experiment_set.selection
    low, high = selection.min_prompt_tokens, selection.max_prompt_tokens
    for key, value in (("min_prompt_tokens", low), ("max_prompt_tokens", high)):
        if value is not None and experiment_set.modality.has_audio_input:
            message = "is not applied: it counts the words of a prompt, and the input is spoken"
            yield warning(f"selection.{key}", message, "filter by a column with selection.filters")
    if low is not None and high is not None and low > high:
        message = f"{low} is larger than max_prompt_tokens {high}"
        yield problem("selection.min_prompt_tokens", message, "", "selection.max_prompt_tokens")
    pair = ("balanced_token_counts", "samples_per_token_count")
    for key, other in (pair, pair[::-1]):
        if getattr(selection, key) is not None and getattr(selection, other) is None:
            yield problem(f"selection.{key}", f"needs {other} beside it", "", f"selection.{other}")
    for index, row_filter in enumerate(selection.filters):
        yield from _filter(f"selection.filters[{index}]", row_filter)


def _filter(place: str, row_filter: RowFilter) -> Findings:
    op, value = row_filter.op, row_filter.value
    path, reads = f"{place}.value", f"{place}.op"
    if op in {"in", "not_in"} and not isinstance(value, list):
        yield problem(path, f'op "{op}" needs a list', "", reads)
    elif op == "between" and not (isinstance(value, list) and len(value) == 2):  # noqa: PLR2004
        yield problem(path, 'op "between" needs [low, high], both ends included', "", reads)
    elif op not in {"in", "not_in", "between"} and isinstance(value, list | dict):
        yield problem(path, f'op "{op}" compares with one value', 'use op "in" for a list', reads)


def _scoring(experiment_set: ExperimentSet) -> Findings:
    shap, variants = experiment_set.shap, experiment_set.experiments
    overrides = [variant.shap_override for variant in variants if variant.shap_override is not None]
    scorings = [shap, *(shap.changed_by(override) for override in overrides)]
    needs_embeddings = any(scoring.needs_embeddings for scoring in scorings)
    embedding = experiment_set.embedding
    if embedding is not None and embedding.model_id is not None and not needs_embeddings:
        message = "is not read: no run compares embeddings"
        fix = "set shap.similarity to CosineSimilarity or EuclideanSimilarity, or remove it"
        yield warning("embedding", message, fix)
    if shap.allow_mask_duplicates or any(override.allow_mask_duplicates for override in overrides):
        message = "has no effect: mllm_shap 0.8 never evaluates a coalition twice"
        yield warning("shap.allow_mask_duplicates", message)
    for index, variant in enumerate(variants):
        override = variant.embedding_override
        base_model = embedding.model_id if embedding is not None else None
        if override is not None and override.model_id is None and base_model is None:
            message, fix = "changes an encoder that no key names", "add model_id here or in embedding"
            yield problem(f"experiments[{index}].embedding_override", message, fix, "embedding")


def _seeds(path: str, variant: Variant, experiment_set: ExperimentSet) -> Findings:
    override = variant.shap_override
    place = f"{path}.shap_override.seed"
    if variant.seeds and override is not None and override.seed is not None:
        yield problem(place, 'is the same setting as "seeds"; keep one', "", f"{path}.seeds")
    generation = experiment_set.generation.changed_by(variant.generation_override)
    if variant.all_seeds and _evaluates_all(variant) and generation.is_greedy:
        message = "has no effect on the values: no coalitions are drawn, and answers are not sampled"
        yield warning(f"{path}.seeds" if variant.seeds else place, message, "remove it")


def _evaluates_all(variant: Variant) -> bool:
    """Return whether the runs of a variant draw no coalitions."""
    block = variant.hierarchical
    if block is None:
        facts = EXPLAINERS.get(variant.explainer_type)
        return facts is not None and not facts.takes_budget
    return {canonical_type(block.shap_type), canonical_type(block.first_layer_type or "exact")} == {"exact"}


def _variant(path: str, variant: Variant) -> Findings:
    kind = variant.explainer_type
    type_key = f"{path}.explainer_type"
    budgets = [key for key in ("num_samples", "fractions", "linear") if getattr(variant, key)]
    place = f"{path}.hierarchical"
    if kind == "hierarchical":
        for key in budgets:
            message = 'a hierarchical variant\'s budgets stand in its "hierarchical" block'
            yield problem(f"{path}.{key}", message, f"move it there as shap_{key}", type_key)
        if variant.hierarchical is None:
            fix = 'write at least {"ks": [10]}'
            yield problem(place, 'is required by explainer "hierarchical"', fix, type_key)
        else:
            yield from _hierarchical(place, variant.hierarchical)
        return
    if not EXPLAINERS[kind].takes_budget:
        what = "the coalitions that lack one player" if kind == "loo" else "every coalition"
        for key in budgets:
            yield problem(f"{path}.{key}", f'"{kind}" evaluates {what}', "remove it", type_key)
    elif not budgets:
        message = f'explainer "{kind}" needs a budget'
        keys = (f"{path}.{key}" for key in ("explainer_type", "num_samples", "fractions", "linear"))
        found = problem(path, message, "add num_samples, fractions or linear, each a list", *keys)
        yield replace(found, reads=found.reads[1:])  # other keys of the variant do not matter
    if variant.hierarchical is not None:
        message = f'belongs to explainer "hierarchical", not "{kind}"'
        yield problem(place, message, "remove it, or change explainer_type", type_key)


def _hierarchical(path: str, block: HierarchicalConfig) -> Findings:
    types = {"shap": block.shap_type, "first_layer": block.first_layer_type or block.shap_type}
    for prefix, kind in types.items():
        keys = [key for key in (f"{prefix}_num_samples", f"{prefix}_fractions") if getattr(block, key)]
        if canonical_type(kind) == "exact":
            for key in keys:
                message = '"exact" evaluates every coalition of a game; it only appears in the runs\' names'
                yield warning(f"{path}.{key}", message, "remove it, or name a sampling explainer")
        elif len(keys) > 1:
            message = f"{keys[0]} decides the budget; {keys[1]} only appears in the runs' names"
            yield warning(f"{path}.{keys[1]}", message, "keep one of the two")
