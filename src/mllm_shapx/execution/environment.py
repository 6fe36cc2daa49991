"""The environment of this process, and its record in the specs of the runs."""

import contextlib
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mllm_shapx.models.base import ModelIdentity, ModelReport
from mllm_shapx.planning.runs import RunSpec
from mllm_shapx.records.environments import Environment, decisive_changes, with_environment, with_model_report
from mllm_shapx.records.runs import RunRecords

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
    return Environment(
        libraries=library_versions(),
        device=kind,
        device_name=_name_of_gpu(identity.device) if kind == "cuda" else None,
        dtype=identity.dtype,
        attn_implementation=run.connector_kwargs.attn_implementation,
    )


def _name_of_gpu(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_name(device))


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
