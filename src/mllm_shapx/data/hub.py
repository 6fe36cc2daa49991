"""Datasets of the hub at one commit: parquet files through the hub cache, or what `datasets` can load."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_shapx.config.models import DatasetConfig
from mllm_shapx.data.columns import listed
from mllm_shapx.data.hub_layout import check_complete, split_files
from mllm_shapx.data.parquet_files import ParquetTable
from mllm_shapx.data.table import BATCH_ROWS, column_values
from mllm_shapx.errors import DatasetError, RowError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_FILE = "/"
"""A file pattern that matches nothing."""
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class _Repository:
    """A dataset repository at one commit."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    cached_only: bool
    """Whether the hub could not be reached, so that only the hub cache may be read."""

    @property
    def where(self) -> str:
        """Return what error messages call it."""
        return f"{self.repo_id} at {self.commit[:12]}" + (" (offline, hub cache)" if self.cached_only else "")


def open_hub_parquet(dataset: DatasetConfig) -> ParquetTable:
    """Download the parquet files of the subset and split into the hub cache and open them.

    What is in the cache is not downloaded again; without a connection the cache alone is read.

    Raises:
        DatasetError: When the repository, commit, subset or split does not exist or cannot be had.
    """
    repository = _locate(dataset)
    has_card = "README.md" in repository.files
    readme = _download(repository, "README.md").read_text("utf-8", "replace") if has_card else None
    names = split_files(repository.files, readme, dataset.subset, dataset.split, repository.where)
    check_complete(names, repository.where)
    # Last shard first: a download that was broken off lacks the first, and cannot pass for a smaller split.
    paths = [_download(repository, name) for name in reversed(names)][::-1]
    return ParquetTable.open(
        paths,
        name=f"{repository.where}, {dataset.subset}/{dataset.split}",
        commit=repository.commit,
        folder=paths[0].parents[names[0].count("/")],
    )


def open_hub_datasets(dataset: DatasetConfig) -> "ArrowTable":
    """Load the subset and split with `datasets`; its memory-mapped Arrow files are read as they are.

    Raises:
        DatasetError: When `datasets` cannot load it; its reason is in the message.
    """
    commit = _commit(dataset)
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    where = f"{dataset.repo_id} at {(commit or 'an unknown commit')[:12]}, {dataset.subset}/{dataset.split}"
    try:
        loaded = datasets.load_dataset(
            dataset.repo_id, name=dataset.subset, split=dataset.split, revision=commit or dataset.revision
        )
    except Exception as error:  # `datasets` raises what its readers raise
        if isinstance(error, MemoryError):
            raise
        raise DatasetError(
            f"{where}: datasets cannot load it ({type(error).__name__}: {_one_line(error)}); "
            "correct dataset.repo_id, dataset.subset, dataset.split or dataset.revision"
        ) from error
    return ArrowTable(where, loaded.data.table, commit)


@dataclass(frozen=True, slots=True)
class ArrowTable:
    """Memory-mapped Arrow data."""

    name: str
    _data: pa.Table
    commit: str | None
    folder: Path | None = None

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return int(self._data.num_rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column names."""
        return tuple(self._data.column_names)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield `columns` of all rows in order."""
        yield from self._data.select(list(columns)).to_batches(max_chunksize=BATCH_ROWS)

    def column(self, name: str) -> list[Any]:
        """Return one whole column as Python values."""
        return column_values(self, name)

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of `columns` in row `index`."""
        if not 0 <= index < self.num_rows:
            raise DatasetError(f"{self.name}: there is no row {index}; it has {self.num_rows} rows")
        values: dict[str, Any] = self._data.slice(index, 1).select(list(columns)).to_pylist()[0]
        return values

    def some_rows(
        self, indices: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """Yield the values of `columns` in the rows `indices`."""
        for index in indices:
            yield index, self.row(index, columns)

    def content(self, columns: Sequence[str]) -> str | None:  # noqa: ARG002 -- the commit tells it
        """Return None."""
        return None


def _locate(dataset: DatasetConfig) -> _Repository:
    """Ask the hub, else its cache, for the commit and the files of the repository."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(dataset.repo_id, revision=dataset.revision, timeout=_TIMEOUT_S)
        if not _COMMIT.fullmatch(dataset.revision or ""):
            _remember(dataset)
    except Exception as error:  # sorted by _refusal
        refusal = _refusal(error, dataset)
        if refusal is not None:
            raise refusal from error
        cached = _cached(dataset)
        if cached is None:
            raise _unreachable(error, dataset) from error
        return cached
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return _Repository(dataset.repo_id, str(info.sha), names, cached_only=False)


def _remember(dataset: DatasetConfig) -> None:
    """Have the hub cache note which commit a branch means: files are downloaded by commit, which does not."""
    from huggingface_hub import snapshot_download

    # The pattern matches nothing: no file is downloaded.
    snapshot_download(
        dataset.repo_id, repo_type="dataset", revision=dataset.revision, allow_patterns=[_NO_FILE]
    )


def _commit(dataset: DatasetConfig) -> str | None:
    """Return the commit that the revision means; None when neither hub nor config can tell."""
    try:
        return _locate(dataset).commit
    except DatasetError as error:
        if isinstance(error.__cause__, Exception) and _refusal(error.__cause__, dataset) is not None:
            raise
        # Offline with nothing in the hub cache: `datasets` has a cache of its own.
        return dataset.revision if dataset.revision and _COMMIT.fullmatch(dataset.revision) else None


def _cached(dataset: DatasetConfig) -> _Repository | None:
    """Return the repository as far as the hub cache holds it."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                dataset.repo_id,
                repo_type="dataset",
                revision=dataset.revision,
                local_files_only=True,
                allow_patterns=[_NO_FILE],
            )
        )
    except (OSError, ValueError):
        return None
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _Repository(dataset.repo_id, folder.name, tuple(names), cached_only=True)


def _download(repository: _Repository, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repository.repo_id,
                name,
                repo_type="dataset",
                revision=repository.commit,
                local_files_only=repository.cached_only,
            )
        )
    except Exception as error:  # the network, the hub and the disk fail in many ways
        if isinstance(error, MemoryError):
            raise
        raise DatasetError(
            f"{repository.where}: {name} cannot be downloaded ({type(error).__name__}: {_one_line(error)}); "
            "check the connection and the free disk space of the hub cache (HF_HOME), then run again"
        ) from error


def _refusal(error: Exception, dataset: DatasetConfig) -> DatasetError | None:
    """Return what the hub's answer means; None when there was no answer."""
    from huggingface_hub import errors

    name = dataset.repo_id
    if isinstance(error, errors.GatedRepoError):
        return DatasetError(
            f"{name}: access must be asked for on its page; then set HF_TOKEN to a token that has it"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DatasetError(
            f"{name}: the hub has no such dataset, or it is private; correct dataset.repo_id, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DatasetError(f"{name}: has no revision {dataset.revision!r}; correct dataset.revision")
    if isinstance(error, errors.HFValidationError):
        return DatasetError(
            f"dataset.repo_id {name!r} is no repository id ({_one_line(error)}); write OWNER/NAME"
        )
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if 400 <= status < 500 and status not in {408, 429}:  # noqa: PLR2004 -- the client's fault; 408, 429: later
        return DatasetError(f"{name}: the hub refuses ({_one_line(error)}); check HF_TOKEN and HF_ENDPOINT")
    return None


def _unreachable(error: Exception, dataset: DatasetConfig) -> DatasetError:
    from huggingface_hub import constants

    revision = f" at {dataset.revision[:12]}" if dataset.revision else ""
    return DatasetError(
        f"{dataset.repo_id}{revision}: is not in the hub cache ({constants.HF_HUB_CACHE}), and the hub at "
        f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {_one_line(error)}); "
        "connect once to download it, unset HF_HUB_OFFLINE, or name local files in dataset.path"
    )


def _one_line(error: Exception) -> str:
    return listed(part for part in (" ".join(str(error).split()),) if part)[:300]
