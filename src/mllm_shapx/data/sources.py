"""Opens the dataset of a config: local files, or a repository of the hub."""

import glob
from pathlib import Path
from typing import assert_never

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.models import DatasetConfig
from mllm_shapx.config.paths import exists, matches
from mllm_shapx.data.hub_layout import local_split_files
from mllm_shapx.data.table import Table
from mllm_shapx.errors import DatasetError

__all__ = ["Table", "open_table"]

_SUFFIXES = {"local_parquet": ".parquet", "local_csv": ".csv"}


def open_table(dataset: DatasetConfig, config_path: Path | None) -> Table:
    """Open `dataset`: hub files are downloaded into the hub cache, rows are read on demand.

    A relative `path` is looked up in the working directory, then in the folder of `config_path`.

    Raises:
        DatasetError: When the dataset is missing, unreadable or offline, or lacks the subset or split.
    """
    if dataset.source == "hf_parquet":
        from mllm_shapx.data.hub import open_hub_parquet

        return open_hub_parquet(dataset)
    if dataset.source == "hf_datasets":
        from mllm_shapx.data.hub import open_hub_datasets

        return open_hub_datasets(dataset)
    files = _local_files(dataset, config_path)
    if dataset.source == "local_csv":
        from mllm_shapx.data.csv_files import open_csv

        return open_csv(files, name=str(dataset.path))
    if dataset.source == "local_parquet":
        from mllm_shapx.data.parquet_files import ParquetTable

        return ParquetTable.open(files, name=str(dataset.path))
    assert_never(dataset.source)


def _local_files(dataset: DatasetConfig, config_path: Path | None) -> list[Path]:
    """Return the files of `dataset.path`, in name order."""
    if not dataset.path:
        raise DatasetError(
            f"dataset.path is missing: source {dataset.source!r} needs a file, a directory or a glob there"
        )
    try:
        path = resolve_path(dataset.path, config_path)
    except ValueError as error:
        raise DatasetError(f"dataset.path: {error}") from error
    found = _expand(path, _SUFFIXES[dataset.source], dataset)
    if found:
        return found
    beside = "" if config_path is None or path.is_absolute() else f" nor beside {config_path}"
    raise DatasetError(
        f"dataset.path {dataset.path!r}: no such file or directory, and no match, in {Path.cwd()}{beside}; "
        "correct it"
    )


def _expand(path: Path, suffix: str, dataset: DatasetConfig) -> list[Path]:
    if not exists(path):
        found = matches(path) if glob.has_magic(str(path)) else ()
        return sorted(match for match in found if match.is_file())
    if path.is_dir():
        return _directory_files(path, suffix, dataset)
    if path.is_file():
        return [path]
    raise DatasetError(
        f"dataset.path {dataset.path!r}: is a pipe or a device, which cannot be read twice; name a file"
    )


def _directory_files(directory: Path, suffix: str, dataset: DatasetConfig) -> list[Path]:
    """Return a directory's files: those of the split if it has a hub repository's layout, else all."""
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob(f"*{suffix}")
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
    )
    if not names:
        raise DatasetError(
            f"dataset.path {dataset.path!r}: the directory {directory} holds no {suffix} file; correct it"
        )
    chosen = local_split_files(names, dataset.subset, dataset.split) or names
    return [directory / name for name in chosen]
