"""A run's settings in the config's own words, resolved: from them its experiment set can be built again."""

import os
from pathlib import Path
from typing import Any

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.paths import exists
from mllm_shapx.config.vocabulary import VALUE_FUNCTIONS
from mllm_shapx.execution.dataset import dataset_path
from mllm_shapx.execution.messages import Study
from mllm_shapx.planning.runs import RunSpec


def in_the_configs_words(study: Study, run: RunSpec) -> dict[str, Any]:
    """Return the blocks of a config that give this run alone, and its entry of `experiments` as `variant`.

    A variant's overrides are in the blocks. Paths of this machine are absolute, and revisions of the hub are
    the commits that were used.
    """
    return {
        "connector": run.connector,
        "connector_kwargs": _connector_kwargs(study, run),
        "device": run.device,
        "dataset": _dataset(study, run),
        "selection": study.config["selection"],
        "generation": run.generation.model_dump(mode="json"),
        "modality": run.modality.model_dump(mode="json"),
        "audio_segmentation": run.audio_segmentation.model_dump(mode="json"),
        "shap": _shap(run),
        "embedding": _embedding(study, run),
        "chat": run.chat.model_dump(mode="json"),
        "variant": dict(run.variant),
    }


def _shap(run: RunSpec) -> dict[str, Any]:
    block = run.shap.model_dump(mode="json")
    if run.value_model is not None and run.shap.value_function is not None:
        facts = VALUE_FUNCTIONS[run.shap.value_function]
        options = {str(facts.model_option): run.value_model.source}
        if not run.value_model.is_directory:
            options["revision"] = run.value_model.commit
        block["value_options"] = {**(block.get("value_options") or {}), **options}
    return block


def _connector_kwargs(study: Study, run: RunSpec) -> dict[str, Any]:
    kwargs = run.connector_kwargs.model_dump(mode="json")
    if study.model_path is None:
        kwargs |= {"model_id": run.model_id, "revision": study.model_commit or run.model_revision}
    else:
        kwargs |= {"model_id": str(study.model_path), "revision": run.model_revision}
    if kwargs["adapter"] is not None:
        kwargs["adapter"] = _absolute(kwargs["adapter"], study.config_path)
    return kwargs


def _dataset(study: Study, run: RunSpec) -> dict[str, Any]:
    dataset = run.dataset.model_dump(mode="json")
    if study.dataset_commit is not None:
        dataset["revision"] = study.dataset_commit
    dataset["path"] = dataset_path(run.dataset, study.config_path) or dataset["path"]
    return dataset


def _embedding(study: Study, run: RunSpec) -> dict[str, Any]:
    if run.embedding is None:
        return {}
    model_id = _absolute(run.embedding.model_id, study.config_path)
    return {**run.embedding.model_dump(mode="json"), "model_id": model_id}


def _absolute(written: str, config_path: Path) -> str:
    """Return what is there as an absolute path, and a hub id as it is."""
    path = resolve_path(written, config_path)
    return os.path.abspath(path) if exists(path) else written  # noqa: PTH100 -- links stay as written
