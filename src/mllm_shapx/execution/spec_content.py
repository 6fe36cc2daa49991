"""A run's `spec.json`: resolved settings, those that must match, versions and environments."""

import contextlib
import os
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.paths import exists
from mllm_shapx.config.vocabulary import VALUE_FUNCTIONS
from mllm_shapx.errors import OutputError
from mllm_shapx.execution.dataset import dataset_path
from mllm_shapx.execution.messages import Study
from mllm_shapx.models.base import ModelIdentity, ModelReport
from mllm_shapx.planning.bounds import budget_bounds
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.environments import (
    ENVIRONMENTS,
    MODEL,
    Environment,
    decisive_changes,
    with_environment,
    with_model_report,
)
from mllm_shapx.records.runs import RunRecords
from mllm_shapx.records.spec import (
    DATASET_COMMIT,
    DATASET_PATH,
    RESULT_SETTINGS,
    SELECTED_ROWS,
    differences,
    selected_rows,
)

_LIBRARIES = (
    "mllm-shapx",
    "mllm-shap",
    "torch",
    "transformers",
    "tokenizers",
    "liquid-audio",
    "ray",
    "datasets",
    "numpy",
)
ENCODER_COMMIT = "embedding_commit"
"""Key in the result settings for the version of the external encoder."""


def run_settings(study: Study, run: RunSpec) -> dict[str, Any]:
    """Return the settings that decide a run's results; equal settings give equal values."""
    settings = {
        **run.result_settings,
        "model_commit": study.model_commit,
        "dataset_commit": study.dataset_commit,
        ENCODER_COMMIT: study.encoder_commit(run),
    }
    if run.value_model is not None:  # else absent: specs of earlier studies stay equal
        settings["value_model_commit"] = run.value_model.commit
    return settings


def run_spec(study: Study, run: RunSpec) -> dict[str, Any]:
    """Return the content of a run's `spec.json`: resolved settings and versions, no secrets."""
    return {
        "schema_version": 2,
        "experiment_set_id": study.experiment_set_id,
        "run_name": run.name,
        "run_slug": run.name,
        "explainer_type": run.explainer_type,
        # The blocks include the variant's overrides. Local paths are absolute; hub revisions are the used
        # commits.
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
        RESULT_SETTINGS: run_settings(study, run),
        "budget_bounds": budget_bounds(run, study.rows, study.players),
        "generation_key": run.generation_key,
        "batch_size": run.connector_kwargs.batch_size,
        "attn_implementation": run.connector_kwargs.attn_implementation,
        "seed": "sha256 of run name and row index; each sample records its own",
        SELECTED_ROWS: selected_rows(study.rows),
        "rows_total": len(study.rows),
        DATASET_COMMIT: study.dataset_commit or study.dataset_content,
        DATASET_PATH: dataset_path(study.dataset, study.config_path),
        "libraries": library_versions(),
        ENVIRONMENTS: [],
        MODEL: None,
    }


def usable_specs(study: Study) -> dict[str, dict[str, Any]]:
    """Return run -> its spec, for runs with a readable one."""
    found = {}
    for name, records in study.records().items():
        with contextlib.suppress(ValueError):  # opening the directory sets a damaged file aside
            if (spec := records.read_usable_spec()) is not None:
                found[name] = spec
    return found


def refuse_other_settings(study: Study, specs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to mix the study's results with those of other settings; `specs` are the recorded ones.

    Raises:
        OutputError: With the keys that differ.
    """
    conflicts = []
    for run in study.runs:
        if run.name not in specs:
            continue
        new = run_settings(study, run)
        # Older versions did not record the encoder's commit; then it is not compared.
        old = {ENCODER_COMMIT: new[ENCODER_COMMIT], **(specs[run.name].get(RESULT_SETTINGS) or {})}
        if keys := differences(old, new):
            conflicts.append(f"  - {run.name}: {', '.join(keys)}")
    if conflicts:
        listed = "\n".join(conflicts)
        raise OutputError(
            f"{study.output_uri} holds samples that were made with other settings; resuming would mix them. "
            f"These keys differ:\n{listed}\n"
            "Put them back, name another experiment_set_id, or give --overwrite"
        )


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
    """Return an existing path as an absolute path, and a hub id unchanged."""
    path = resolve_path(written, config_path)
    return os.path.abspath(path) if exists(path) else written  # noqa: PTH100 -- keeps symbolic links


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def environment_of(identity: ModelIdentity, run: RunSpec) -> Environment:
    """Return the environment of a model in this process."""
    kind = identity.device.partition(":")[0]
    device_name = None
    if kind == "cuda":
        import torch

        device_name = str(torch.cuda.get_device_name(identity.device))
    return Environment(
        libraries=library_versions(),
        device=kind,
        device_name=device_name,
        dtype=identity.dtype,
        attn_implementation=run.connector_kwargs.attn_implementation,
    )


def record_report(runs: Iterable[RunRecords], report: ModelReport) -> None:
    """Add a model's report to the specs of runs. Notes of earlier workers stay."""
    for records in runs:
        spec = _spec_of(records)
        updated = None if spec is None else with_model_report(spec, report.notes, report.settings)
        if updated is not None and updated != spec:
            records.write_spec(updated)


def _spec_of(records: RunRecords) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):  # `verify` reports a damaged file
        return records.read_spec()
    return None


def record_environment(runs: Iterable[tuple[RunRecords, int]], environment: Environment) -> str | None:
    """Add the environment of the samples from now on to the specs of runs (files, number of samples).

    Returns:
        A warning if a run then has samples of environments whose answers may differ; else None.
    """
    changes: dict[str, None] = {}
    mixed = 0
    for records, samples in runs:
        spec = _spec_of(records)
        updated = None if spec is None else with_environment(spec, environment, samples, time.time())
        if spec is None or updated is None:
            continue
        if samples and (found := decisive_changes(spec, environment)):
            changes.update(dict.fromkeys(found))
            mixed += samples
        records.write_spec(updated)
    if not changes:
        return None
    return (
        f"warning: {mixed} sample(s) were made with something else ({', '.join(changes)}): the model's texts "
        "may differ from here on. Every sample names its environment; spec.json lists them"
    )
