"""What the further names of a config need: which combinations of keys work, and what to write otherwise."""

from collections.abc import Iterator
from typing import Any

from mllm_shapx.config import servers
from mllm_shapx.config.models import ExperimentSet, ShapConfig, ShapOverride

Place = tuple[str | int, ...]
Fault = tuple[Place, str, str, tuple[Place, ...]]
"""Where, what is wrong, what to write, and the other keys that it follows from."""


def problems(experiment_set: ExperimentSet) -> Iterator[Fault]:
    """Yield what is wrong with the scoring of the config and of its variants."""
    blocks: list[tuple[Place, ShapConfig | ShapOverride, ShapConfig]] = [
        (("shap",), experiment_set.shap, experiment_set.shap)
    ]
    for index, variant in enumerate(experiment_set.experiments):
        if (override := variant.shap_override) is not None:
            place: Place = ("experiments", index, "shap_override")
            blocks.append((place, override, experiment_set.shap.changed_by(override)))
    for place, written, scoring in blocks:
        yield from _value_function(place, written, scoring, experiment_set)


def _value_function(
    place: Place, written: ShapConfig | ShapOverride, scoring: ShapConfig, experiment_set: ExperimentSet
) -> Iterator[Fault]:
    name, key = scoring.value_function, (*place, "value_function")
    if name is None:
        if written.value_options is not None:
            message = "are the options of a value function, and none is named"
            yield (*place, "value_options"), message, "name it in value_function, or remove them", (key,)
        return
    if written.value_function is not None and "similarity" in written.model_fields_set and written.similarity:
        message = f'"{name}" takes the place of the similarity, and both are named'
        yield (
            key,
            message,
            'remove one; "similarity": null takes an inherited one back',
            ((*place, "similarity"),),
        )
    if {"value_function", "value_options"} & written.model_fields_set:
        fault = _options_fault(name, scoring.value_options or {})
        if fault is not None:
            where = key if written.value_options is None else (*place, "value_options")
            yield where, fault, "", (key, (*place, "value_options"))
    output: Place = ("modality", "output_modality")
    if experiment_set.modality.output_modality != "text":
        yield (
            key,
            f'"{name}" compares texts, and the answers are spoken',
            ('set modality.output_modality to "text", or name a similarity'),
            (output,),
        )
    if scoring.reads == "likelihoods" and experiment_set.connector_kwargs.strip_reasoning:
        message = (
            f'"{name}" reads how likely a text is right behind the prompt, and reasoning would precede it'
        )
        fix = "set connector_kwargs.strip_reasoning to false, or use a value function of answers"
        yield key, message, fix, (("connector_kwargs", "strip_reasoning"),)
    if scoring.reads != "answers" and experiment_set.connector == servers.CONNECTOR:
        message = f'"{name}" reads the model\'s probabilities of given tokens, which a server does not give'
        yield key, message, 'use connector "hf_text", or a value function of answers', (("connector",),)


def _options_fault(name: str, options: dict[str, Any]) -> str | None:
    """Return what mllm_shap says of a value function's options, None where they are right."""
    from mllm_shap import ConfigError, PluginGroup
    from mllm_shap.plugins.builtin import BUILTIN_PLUGINS
    from mllm_shap.plugins.options import validate_plugin_options

    factory = BUILTIN_PLUGINS[PluginGroup.VALUE_FNS][name]
    try:
        validate_plugin_options(factory, PluginGroup.VALUE_FNS, name, options)
    except ConfigError as error:
        return str(error)
    return None
