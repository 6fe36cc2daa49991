"""Finds samples whose rows differ from today's dataset, or from the rows of other runs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mllm_shapx.config.models import DatasetConfig, ModalityConfig
from mllm_shapx.data.digests import compare_samples
from mllm_shapx.data.sources import open_table
from mllm_shapx.errors import DatasetError
from mllm_shapx.records.results import SampleResult
from mllm_shapx.records.spec import DATASET_PATH, RESULT_SETTINGS
from mllm_shapx.reporting.reading import RunFiles

type MadeFrom = Mapping[int, str]
"""Row -> `SampleFile.made_from` of its sample."""


def same_content(one: SampleResult, other: SampleResult) -> bool:
    """Return whether two samples of a row were made from the same content."""
    if one.row_digest is not None and other.row_digest is not None:
        return one.row_digest == other.row_digest
    return one.prompt_texts == other.prompt_texts


def mixed_rows(runs: Mapping[str, MadeFrom]) -> tuple[int, ...]:
    """Return the rows that do not have the same content in all runs, ascending."""
    found: dict[tuple[int, bool], set[str]] = {}
    for made_from in runs.values():
        for row, digest in made_from.items():
            # A digest of texts alone is only compared with others of its kind.
            found.setdefault((row, digest.startswith("texts:")), set()).add(digest)
    return tuple(sorted({row for (row, _), digests in found.items() if len(digests) > 1}))


def compare_with_dataset(
    runs: Sequence[tuple[RunFiles, MadeFrom]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the differences between samples and today's dataset, and which samples were not compared.

    Both are sentences. A dataset of the hub is not read: its commit does not change.
    """
    found: list[str] = []
    notes: list[str] = []
    groups: dict[str, dict[str, MadeFrom]] = {}
    for run, made_from in runs:
        settings = _settings(run)
        if settings is not None and made_from:
            groups.setdefault(json.dumps(settings, sort_keys=True), {})[run.name] = made_from
    for written, samples in groups.items():
        settings = json.loads(written)
        try:
            dataset = DatasetConfig.model_validate(settings["dataset"])
            modality = ModalityConfig.model_validate(settings["modality"])
            changed, changes = compare_samples(open_table(dataset, None), dataset, modality, samples)
        except (DatasetError, ValidationError, OSError) as error:
            reason = "its settings cannot be read" if isinstance(error, ValidationError) else error
            notes.append(f"the samples were not compared with the dataset: {reason}")
            continue
        if changed:
            found.append(f"{changes.in_words()} (runs: {', '.join(changed)})")
    return tuple(found), tuple(notes)


def _settings(run: RunFiles) -> dict[str, Any] | None:
    """Return a run's settings of the dataset; None where the dataset cannot change or is not known."""
    settings = run.spec.get(RESULT_SETTINGS)
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(dataset, dict) or settings.get("dataset_commit"):
        return None
    path = run.spec.get(DATASET_PATH) or dataset.get("path")
    if not path:
        return None
    return {"dataset": {**dataset, "path": path}, "modality": settings.get("modality") or {}}
