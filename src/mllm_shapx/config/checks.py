"""Checks across keys of a config: problems and warnings."""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mllm_shapx.config import servers, vocabulary_checks
from mllm_shapx.config.diagnosis import Place, dotted
from mllm_shapx.config.models import DatasetConfig, ExperimentSet, RowFilter
from mllm_shapx.config.values import canonical_type
from mllm_shapx.config.variants import HierarchicalConfig, Variant
from mllm_shapx.config.vocabulary import CONNECTORS, EXPLAINERS, KNOWN_SUBSETS, ConnectorFacts
from mllm_shapx.errors import Problem

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


@dataclass(frozen=True)
class Finding:
    """A problem or a warning on keys that are well-formed by themselves."""

    path: Place
    problem: Problem
    reads: tuple[Place, ...]
    """The keys that cause it."""
    warning: bool = False

    def depends_on(self, places: Collection[Place]) -> bool:
        """Whether its cause is a key at, above or below any of `places`."""
        return any(
            place[: len(read)] == read or read[: len(place)] == place
            for place in places
            for read in self.reads
        )


def findings(experiment_set: ExperimentSet) -> Iterator[Finding]:
    """Yield all problems and warnings across keys; assumes well-formed keys."""
    yield from _modality(experiment_set)
    yield from _prompts(experiment_set)
    yield from _loading(experiment_set)
    yield from _server(experiment_set)
    yield from _secrets(experiment_set.model_dump(mode="json"), ())
    yield from _dataset(experiment_set.dataset)
    yield from _selection(experiment_set)
    yield from _scoring(experiment_set)
    for place, message, fix, reads in vocabulary_checks.problems(experiment_set):
        yield _problem(place, message, fix, reads)
    yield from _without_effect(experiment_set)
    for index, variant in enumerate(experiment_set.experiments):
        yield from _variant(("experiments", index), variant)
        yield from _seeds(("experiments", index), variant, experiment_set)


def _problem(path: Place, message: str, fix: str = "", reads: tuple[Place, ...] = ()) -> Finding:
    return Finding(path, Problem(dotted(path), message, fix), (path, *reads))


def _warning(path: Place, message: str, fix: str = "") -> Finding:
    return Finding(path, Problem(dotted(path), message, fix), (path,), warning=True)


def _modality(experiment_set: ExperimentSet) -> Iterator[Finding]:
    modality = experiment_set.modality
    if not CONNECTORS[connector := experiment_set.connector].has_audio:
        for key in ("input_modality", "output_modality"):
            value = getattr(modality, key)
            if value != "text":
                message = f'connector "{connector}" takes text only, not "{value}"'
                fix = 'write "text", or use connector "liquid_audio"'
                yield _problem(("modality", key), message, fix, reads=(("connector",),))
    if experiment_set.audio_segmentation.method == "sgpa" and not modality.has_audio_input:
        message = '"sgpa" cuts recordings into players, and the input is text'
        fix = 'remove it, or set modality.input_modality to "audio__..."'
        reads: tuple[Place, ...] = (("modality", "input_modality"),)
        yield _problem(("audio_segmentation", "method"), message, fix, reads)


def _reads(facts: ConnectorFacts, prompt_key: str) -> bool:
    return facts.prompt_keys is None or prompt_key in facts.prompt_keys


def _prompts(experiment_set: ExperimentSet) -> Iterator[Finding]:
    """Yield problems with the settings of prompts and of the answers' texts."""
    options = experiment_set.connector_kwargs
    block: Place = ("connector_kwargs",)
    for key in options.chat_settings:
        if not _reads(CONNECTORS[experiment_set.connector], key):
            readers = [name for name, facts in CONNECTORS.items() if _reads(facts, key)]
            named = " and ".join(f'"{name}"' for name in readers)
            kind = "connector" if len(readers) == 1 else "connectors"
            message = f'is read by {kind} {named} alone, not by "{experiment_set.connector}"'
            yield _problem((*block, key), message, "remove it", reads=(("connector",),))
    variables: Place = (*block, "chat_template_kwargs")
    for key in options.chat_template_kwargs or {}:
        if key in _NOT_FOR_TEMPLATES:
            message = (
                "is no variable of a chat template: the prompt is always rendered and tokenized in one way"
            )
            yield _problem((*variables, key), message, "remove it")
    if (options.chat_template_kwargs or {}).get("sanitize_control_tokens") and (
        experiment_set.chat.assistant_prefill
    ):
        prefill: Place = ("chat", "assistant_prefill")
        message = "cannot be had with an assistant_prefill, which transformers does not sanitize"
        yield _problem((*variables, "sanitize_control_tokens"), message, "remove one of the two", (prefill,))
    if options.strip_reasoning and experiment_set.embedding is None and experiment_set.shap.needs_embeddings:
        message = (
            f"{experiment_set.shap.similarity} compares the model's own states, and these cover an answer's "
            "reasoning too"
        )
        fix = "use TfIdfCosineSimilarity, or name an encoder in embedding.model_id"
        yield _warning((*block, "strip_reasoning"), message, fix)


def _loading(experiment_set: ExperimentSet) -> Iterator[Finding]:
    kwargs, connector = experiment_set.connector_kwargs, experiment_set.connector
    for key in kwargs.loading_settings:
        if connector != "hf_text" and key not in servers.SERVER_KEYS:
            message = f'is not known to connector "{connector}"'
            yield _problem(("connector_kwargs", key), message, "remove it", reads=(("connector",),))
    quantization, gguf_file = kwargs.quantization, kwargs.gguf_file
    if quantization is not None and experiment_set.device in {"cpu", "mps"}:
        message = f'"{quantization}" needs CUDA (bitsandbytes), and device is "{experiment_set.device}"'
        yield _problem(("connector_kwargs", "quantization"), message, reads=(("device",),))
    if quantization is not None and gguf_file is not None:
        message = "is not read for a GGUF file, whose weights are unpacked"
        reads: tuple[Place, ...] = (("connector_kwargs", "gguf_file"),)
        yield _problem(("connector_kwargs", "quantization"), message, "remove one of the two", reads)


def _server(experiment_set: ExperimentSet) -> Iterator[Finding]:
    """Yield problems with the keys of a model behind a server."""
    kwargs, block = experiment_set.connector_kwargs, ("connector_kwargs",)
    reads: tuple[Place, ...] = (("connector",),)
    if experiment_set.connector != servers.CONNECTOR:
        for key in servers.SERVER_KEYS:
            if getattr(kwargs, key) is not None:
                message = f'is read by connector "openai" alone, not by "{experiment_set.connector}"'
                yield _problem((*block, key), message, "remove it", reads)
        return
    if kwargs.base_url is not None and kwargs.server is not None:
        message = "cannot stand beside connector_kwargs.server, whose address is chosen when it starts"
        yield _problem((*block, "base_url"), message, "remove one of the two", reads)
    if kwargs.base_url is None and kwargs.server is None:
        fix = f"such as http://localhost:8000/v1; LM Studio's is {servers.LM_STUDIO_URL}"
        yield _problem((*block, "base_url"), "is the address of the server, and is required", fix, reads)
    if kwargs.model_id is None:
        message = "is required: the name that the server knows the model by"
        yield _problem((*block, "model_id"), message, "GET base_url/models lists them", reads)
    if experiment_set.chat.assistant_prefill:
        message = "cannot be sent to a server, which begins every answer itself"
        yield _problem(("chat", "assistant_prefill"), message, "remove it", reads)
    for key in ("revision", "attn_implementation", "dtype", "batch_size"):
        if getattr(kwargs, key) not in {None, "auto"}:
            yield _warning((*block, key), "is not read: the server decides it", "remove it")
    yield from _states(experiment_set)


def _states(experiment_set: ExperimentSet) -> Iterator[Finding]:
    """Yield the runs that compare a model's states when these are not available."""
    shap, embedding = experiment_set.shap, experiment_set.embedding
    reads: tuple[Place, ...] = (("connector",), ("shap", "similarity"), ("embedding",))
    for index, variant in enumerate(experiment_set.experiments):
        changed, encoder = variant.shap_override, variant.embedding_override
        scoring = shap.changed_by(changed)
        has_encoder = (embedding and embedding.model_id) or (encoder and encoder.model_id)
        if not scoring.needs_embeddings or has_encoder:
            continue
        place: Place = ("shap", "similarity")
        if changed is not None and "similarity" in changed.model_fields_set:
            place = ("experiments", index, "shap_override", "similarity")
        message = f'"{scoring.similarity}" compares the model\'s own states, which a server does not give'
        fix = "name an encoder in embedding.model_id, or use TfIdfCosineSimilarity"
        yield _problem(place, message, fix, reads)
        if place[0] == "shap":
            return


def _secrets(value: object, place: Place) -> Iterator[Finding]:
    """Yield the places of texts that look like API keys, without the texts."""
    if isinstance(value, str) and servers.looks_like_key(value):
        message = "holds what looks like an API key, and configs are copied into the results"
        fix = "remove it, revoke the key, and name a variable in connector_kwargs.api_key_env"
        yield _problem(place, message, fix)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _secrets(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _secrets(item, (*place, index))


def _dataset(dataset: DatasetConfig) -> Iterator[Finding]:
    source: Place = ("dataset", "source")
    if dataset.is_local and not dataset.path:
        message = f'source "{dataset.source}" needs a path: a file, a directory or a glob'
        yield _problem(("dataset", "path"), message, reads=(source,))
    if dataset.is_local:
        return
    if dataset.path:
        yield _warning(("dataset", "path"), f'is not read by source "{dataset.source}"', "remove it")
    revision = dataset.revision
    if revision is not None and not _COMMIT.fullmatch(revision) and os.environ.get(_UNPINNED) != "1":
        message = f'"{revision}" is no commit (40 hex digits), so the rows may change under the study'
        fix = f"pin the commit, or set {_UNPINNED}=1; the commit that was used is recorded"
        yield _problem(("dataset", "revision"), message, fix, reads=(source,))
    is_default = dataset.repo_id == DatasetConfig.model_fields["repo_id"].default
    if is_default and dataset.subset not in KNOWN_SUBSETS:
        message = f'"{dataset.subset}" is none of the subsets known here'
        yield _warning(("dataset", "subset"), message, "known: " + ", ".join(sorted(KNOWN_SUBSETS)))
    if dataset.trust_remote_code:
        message = "has no effect: the datasets library runs no remote code any more"
        yield _warning(("dataset", "trust_remote_code"), message)


def _selection(experiment_set: ExperimentSet) -> Iterator[Finding]:
    selection = experiment_set.selection
    low, high = selection.min_prompt_tokens, selection.max_prompt_tokens
    for key, value in (("min_prompt_tokens", low), ("max_prompt_tokens", high)):
        if value is not None and experiment_set.modality.has_audio_input:
            message = "is not applied: it counts the words of a prompt, and the input is spoken"
            yield _warning(("selection", key), message, "filter by a column with selection.filters")
    if low is not None and high is not None and low > high:
        message = f"{low} is larger than max_prompt_tokens {high}"
        yield _problem(
            ("selection", "min_prompt_tokens"), message, reads=(("selection", "max_prompt_tokens"),)
        )
    pair = ("balanced_token_counts", "samples_per_token_count")
    for key, other in (pair, pair[::-1]):
        if getattr(selection, key) is not None and getattr(selection, other) is None:
            yield _problem(("selection", key), f"needs {other} beside it", reads=(("selection", other),))
    for index, row_filter in enumerate(selection.filters):
        yield from _filter(("selection", "filters", index, "value"), row_filter)


def _filter(path: Place, row_filter: RowFilter) -> Iterator[Finding]:
    op, value = row_filter.op, row_filter.value
    reads: tuple[Place, ...] = ((*path[:-1], "op"),)
    if op in {"in", "not_in"} and not isinstance(value, list):
        yield _problem(path, f'op "{op}" needs a list', reads=reads)
    elif op == "between" and not (isinstance(value, list) and len(value) == 2):  # noqa: PLR2004
        yield _problem(path, 'op "between" needs [low, high], both ends included', reads=reads)
    elif op not in {"in", "not_in", "between"} and isinstance(value, list | dict):
        yield _problem(path, f'op "{op}" compares with one value', 'use op "in" for a list', reads=reads)


def _scoring(experiment_set: ExperimentSet) -> Iterator[Finding]:
    shap, variants = experiment_set.shap, experiment_set.experiments
    overrides = [variant.shap_override for variant in variants if variant.shap_override is not None]
    scorings = [shap, *(shap.changed_by(override) for override in overrides)]
    needs_embeddings = any(scoring.needs_embeddings for scoring in scorings)
    embedding = experiment_set.embedding
    if embedding is not None and embedding.model_id is not None and not needs_embeddings:
        message = "is not read: no run compares embeddings"
        fix = "set shap.similarity to CosineSimilarity or EuclideanSimilarity, or remove it"
        yield _warning(("embedding",), message, fix)
    if shap.allow_mask_duplicates or any(override.allow_mask_duplicates for override in overrides):
        message = "has no effect: mllm_shap 0.8 never evaluates a coalition twice"
        yield _warning(("shap", "allow_mask_duplicates"), message)
    for index, variant in enumerate(variants):
        override = variant.embedding_override
        base_model = embedding.model_id if embedding is not None else None
        if override is not None and override.model_id is None and base_model is None:
            place: Place = ("experiments", index, "embedding_override")
            message = "changes an encoder that no key names"
            yield _problem(place, message, "add model_id here or in embedding", reads=(("embedding",),))


def _without_effect(experiment_set: ExperimentSet) -> Iterator[Finding]:
    """Yield a warning for each accepted key without effect."""
    if experiment_set.runtime.n_generator_jobs is not None:
        message = "has no effect: the number of workers is the command line's"
        yield _warning(("runtime", "n_generator_jobs"), message, "use --num-workers or --workers-per-gpu")


def _seeds(path: Place, variant: Variant, experiment_set: ExperimentSet) -> Iterator[Finding]:
    override = variant.shap_override
    place: Place = (*path, "shap_override", "seed")
    if variant.seeds and override is not None and override.seed is not None:
        reads: tuple[Place, ...] = ((*path, "seeds"),)
        yield _problem(place, 'is the same setting as "seeds"; keep one', reads=reads)
    generation = experiment_set.generation.changed_by(variant.generation_override)
    if variant.all_seeds and _evaluates_all(variant) and generation.is_greedy:
        message = "has no effect on the values: no coalitions are drawn, and answers are not sampled"
        yield _warning((*path, "seeds") if variant.seeds else place, message, "remove it")


def _evaluates_all(variant: Variant) -> bool:
    """Return whether the runs of a variant draw no coalitions."""
    block = variant.hierarchical
    if block is None:
        facts = EXPLAINERS.get(variant.explainer_type)
        return facts is not None and not facts.takes_budget
    return {canonical_type(block.shap_type), canonical_type(block.first_layer_type or "exact")} == {"exact"}


def _variant(path: Place, variant: Variant) -> Iterator[Finding]:
    kind = variant.explainer_type
    budgets = [key for key in ("num_samples", "fractions", "linear") if getattr(variant, key)]
    type_path: Place = (*path, "explainer_type")
    if kind != "hierarchical" and not EXPLAINERS[kind].takes_budget:
        what = "the coalitions that lack one player" if kind == "loo" else "every coalition"
        for key in budgets:
            yield _problem((*path, key), f'"{kind}" evaluates {what}', "remove it", reads=(type_path,))
    elif kind == "hierarchical":
        for key in budgets:
            message = 'a hierarchical variant\'s budgets stand in its "hierarchical" block'
            yield _problem((*path, key), message, f"move it there as shap_{key}", reads=(type_path,))
    elif not budgets:
        problem = Problem(
            dotted(path),
            f'explainer "{kind}" needs a budget',
            "add num_samples, fractions or linear, each a list",
        )
        keys = ("explainer_type", "num_samples", "fractions", "linear")
        yield Finding(path, problem, tuple((*path, key) for key in keys))
    place: Place = (*path, "hierarchical")
    if kind == "hierarchical" and variant.hierarchical is None:
        yield _problem(
            place, 'is required by explainer "hierarchical"', 'write at least {"ks": [10]}', (type_path,)
        )
    elif kind != "hierarchical" and variant.hierarchical is not None:
        message = f'belongs to explainer "hierarchical", not "{kind}"'
        yield _problem(place, message, "remove it, or change explainer_type", reads=(type_path,))
    elif variant.hierarchical is not None:
        yield from _hierarchical(place, variant.hierarchical)


def _hierarchical(path: Place, block: HierarchicalConfig) -> Iterator[Finding]:
    inner, first_layer = (
        canonical_type(block.shap_type),
        canonical_type(block.first_layer_type or block.shap_type),
    )
    for prefix, kind in (("shap", inner), ("first_layer", first_layer)):
        keys = [key for key in (f"{prefix}_num_samples", f"{prefix}_fractions") if getattr(block, key)]
        if kind == "exact":
            for key in keys:
                message = '"exact" evaluates every coalition of a game; it only appears in the runs\' names'
                yield _warning((*path, key), message, "remove it, or name a sampling explainer")
        elif len(keys) > 1:
            message = f"{keys[0]} decides the budget; {keys[1]} only appears in the runs' names"
            yield _warning((*path, keys[1]), message, "keep one of the two")
