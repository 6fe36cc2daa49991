"""Checks of a config's names: allowed combinations of keys, and the fix for others."""

from importlib.util import find_spec
from typing import Any

from mllm_shapx.config.findings import Findings, problem
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.config.scoring import ShapConfig
from mllm_shapx.config.values import canonical_type
from mllm_shapx.config.variants import Variant
from mllm_shapx.config.vocabulary import CONNECTORS, EXPLAINERS, context_roles


def problems(settings: ExperimentSet) -> Findings:
    """Yield problems with the scoring, in the config and its variants, and with their explainers."""
    shap = settings.shap
    blocks: list[tuple[str, ShapConfig, ShapConfig]] = [("shap", shap, shap)]
    for index, variant in enumerate(settings.experiments):
        if (override := variant.shap_override) is not None:
            place = f"experiments[{index}].shap_override"
            blocks.append((place, override, shap.changed_by(override)))
    for place, written, scoring in blocks:
        yield from _value_function(place, written, scoring, settings)
        yield from _players(place, written, scoring, settings)
        yield from _keep(place, written, settings)
        yield from _absence(place, written, scoring, settings)
    for index, variant in enumerate(settings.experiments):
        yield from _package(f"experiments[{index}]", variant)
        yield from _interactions(f"experiments[{index}]", variant)
        yield from _stop_when(f"experiments[{index}]", variant)


def _package(place: str, variant: Variant) -> Findings:
    """Yield a fault for each explainer whose package is not installed."""
    named: dict[str, str | None] = {"explainer_type": variant.explainer_type}
    if (block := variant.hierarchical) is not None:
        named |= {f"hierarchical.{key}": getattr(block, key) for key in ("shap_type", "first_layer_type")}
    for key, name in named.items():
        facts = EXPLAINERS.get(canonical_type(name))
        if facts is not None and facts.package is not None and find_spec(facts.package) is None:
            message = f'"{name}" needs scikit-learn, which is not installed'
            fix = "install the extra: pip install 'mllm-shapx[proxy]', or take \"leverage\""
            yield problem(f"{place}.{key}", message, fix)


def _interactions(place: str, variant: Variant) -> Findings:
    """Yield the reasons why a variant's interactions cannot be computed."""
    if variant.interactions is None:
        return
    key, kind = f"{place}.interactions", variant.explainer_type
    if kind == "hierarchical" or EXPLAINERS[kind].estimator != "exact":
        message = f'are computed from the values of all coalitions, and "{kind}" evaluates some of them'
        fix = 'move them to a variant with explainer_type "exact", which may share its answers'
        yield problem(key, message, fix, f"{place}.explainer_type")
    if find_spec("shapiq") is None:
        fix = "install the extra: pip install 'mllm-shapx[interactions]'"
        yield problem(key, "need shapiq, which is not installed", fix)


def _stop_when(place: str, variant: Variant) -> Findings:
    """Yield why a variant's sampling cannot stop early."""
    kind = variant.explainer_type
    facts = EXPLAINERS.get(kind)
    if variant.stop_when is None or (facts is not None and facts.grows):
        return
    if facts is None:
        why = '"hierarchical" has none: its lower games depend on the values of the games above'
    elif not facts.takes_budget:
        why = f'"{kind}" has none: it draws nothing'
    elif facts.estimator == "proxy":
        why = f'"{kind}" has none: its trees fit themselves to the draws'
    else:
        why = f'"{kind}" draws other coalitions for each budget, so that rounds would ask for more than it'
    names = ", ".join(f'"{name}"' for name, each in EXPLAINERS.items() if each.grows)
    message = f"goes on until standard errors are small, and {why}"
    yield problem(f"{place}.stop_when", message, f"remove it, or take {names}", f"{place}.explainer_type")


def _value_function(
    place: str, written: ShapConfig, scoring: ShapConfig, settings: ExperimentSet
) -> Findings:
    name, key = scoring.value_function, f"{place}.value_function"
    options_key = f"{place}.value_options"
    if name is None:
        if written.value_options is not None:
            message = "are the options of a value function, and none is named"
            yield problem(options_key, message, "name it in value_function, or remove them", key)
        return
    if written.value_function is not None and "similarity" in written.model_fields_set and written.similarity:
        message = f'"{name}" takes the place of the similarity, and both are named'
        fix = 'remove one; "similarity": null takes an inherited one back'
        yield problem(key, message, fix, f"{place}.similarity")
    if {"value_function", "value_options"} & written.model_fields_set:
        fault = _options_fault(name, scoring.value_options or {})
        if fault is not None:
            where = key if written.value_options is None else options_key
            yield problem(where, fault, "", key, options_key)
    if settings.modality.output_modality != "text":
        message = f'"{name}" compares texts, and the answers are spoken'
        fix = 'set modality.output_modality to "text", or name a similarity'
        yield problem(key, message, fix, "modality.output_modality")
    if scoring.reads == "likelihoods" and settings.connector_kwargs.strip_reasoning:
        message = f'"{name}" reads how likely a text is right after the prompt, where reasoning would come'
        fix = "set connector_kwargs.strip_reasoning to false, or use a value function of answers"
        yield problem(key, message, fix, "connector_kwargs.strip_reasoning")
    if scoring.reads != "answers" and not CONNECTORS[settings.connector].has_likelihoods:
        message = f'"{name}" reads the model\'s probabilities of given tokens, which a server does not give'
        yield problem(key, message, 'use connector "hf_text", or a value function of answers', "connector")


def _options_fault(name: str, options: dict[str, Any]) -> str | None:
    """Return mllm_shap's message on a value function's options, None if they are right."""
    from mllm_shap import ConfigError, PluginGroup
    from mllm_shap.plugins.builtin import BUILTIN_PLUGINS
    from mllm_shap.plugins.options import validate_plugin_options

    factory = BUILTIN_PLUGINS[PluginGroup.VALUE_FNS][name]
    try:
        validate_plugin_options(factory, PluginGroup.VALUE_FNS, name, options)
    except ConfigError as error:
        return str(error)
    return None


def _players(place: str, written: ShapConfig, scoring: ShapConfig, settings: ExperimentSet) -> Findings:
    if "players" not in written.model_fields_set or scoring.players == "words":
        return
    key = f"{place}.players"
    if settings.modality.has_audio_input:
        message = f'"{scoring.players}" cuts written prompts, and the input is spoken'
        fix = 'use "words"; audio_segmentation cuts recordings'
        yield problem(key, message, fix, "modality.input_modality")
    if scoring.players == "tokens" and not CONNECTORS[settings.connector].has_tokenizer:
        message = f'"tokens" needs connector "hf_text", not "{settings.connector}"'
        yield problem(key, message, 'use "words"', "connector")


def _keep(place: str, written: ShapConfig, settings: ExperimentSet) -> Findings:
    if written.keep is None:
        return
    key = f"{place}.keep"
    always = context_roles(settings.chat.system_roles_setup) | set(written.keep.roles)
    prompted = {"user", *(("system",) if settings.chat.system_prompt.strip() else ())}
    if not prompted - always:
        message = "keeps every message, so that nothing is left to explain"
        yield problem(f"{key}.roles", message, "leave out a role", "chat.system_roles_setup")
    for number, word in enumerate(written.keep.words):
        if not word.strip():
            yield problem(f"{key}.words[{number}]", "must not be empty")
    method = "audio_segmentation.method"
    if "user" in written.keep.roles and settings.audio_segmentation.method == "sgpa":
        message = 'keeps the spoken messages, which audio_segmentation.method "sgpa" explains'
        yield problem(f"{key}.roles", message, 'leave out "user"', method)
    if written.keep.words and settings.audio_segmentation.method == "sgpa":
        message = 'are words of written messages, and audio_segmentation.method "sgpa" explains spoken ones'
        yield problem(f"{key}.words", message, "remove them", method)


def _absence(place: str, written: ShapConfig, scoring: ShapConfig, settings: ExperimentSet) -> Findings:
    text, key, absence = scoring.absence_text, f"{place}.absence_text", f"{place}.absence"
    if text is not None and {"absence", "absence_text"} & written.model_fields_set:
        if scoring.absence == "delete":
            yield problem(
                key, 'stands in the place of nothing: absence is "delete"', 'set absence to "pad"', absence
            )
        elif not text:
            yield problem(key, "must not be empty", 'to leave players out, set absence to "delete"', absence)
        elif scoring.absence == "neutral" and len(text) != 1:
            message = f'"{text[:20]}" is repeated to the length of each absent piece, so it is one character'
            yield problem(key, message, 'for a longer text, set absence to "pad"', absence)
    if written.audio_absence is not None and not settings.modality.has_audio_input:
        message = "stands in the place of stretches of recordings, and the input is text"
        yield problem(f"{place}.audio_absence", message, "remove it", "modality.input_modality")
