"""Datasets of the hub at one commit: parquet files in the hub cache, or data loaded by `datasets`."""

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from mllm_shapx.config.models import DatasetConfig
from mllm_shapx.data.hub_access import (
    HubError,
    Named,
    ask,
    is_connection_problem,
    offline,
    one_line,
    problem_of,
    quiet,
)
from mllm_shapx.data.hub_layout import check_complete, split_files
from mllm_shapx.data.parquet_files import ParquetTable
from mllm_shapx.data.table import ArrowTable
from mllm_shapx.errors import DatasetError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_FILE = "/"
"""A file pattern that matches nothing."""


@dataclass(frozen=True, slots=True)
class _Repository:
    """A dataset repository at one commit."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    cached_only: bool
    """Whether the hub is unreachable, so that only the hub cache is read."""

    @property
    def where(self) -> str:
        """Return the repository's name for error messages."""
        return f"{self.repo_id} at {self.commit[:12]}" + (" (offline, hub cache)" if self.cached_only else "")


def open_hub_parquet(dataset: DatasetConfig) -> ParquetTable:
    """Download the parquet files of the subset and split into the hub cache and open them.

    Cached files are not downloaded again; without a connection only the cache is read.

    Raises:
        DatasetError: When the repository, commit, subset or split does not exist or cannot be downloaded.
    """
    try:
        repository = _locate(dataset)
    except HubError as error:
        raise DatasetError(_named(dataset).explain(error)) from error
    has_card = "README.md" in repository.files
    readme = _download(repository, "README.md").read_text("utf-8", "replace") if has_card else None
    names = split_files(repository.files, readme, dataset.subset, dataset.split, repository.where)
    check_complete(names, repository.where)
    # Last shard first: an interrupted download then lacks the first shard and does not look like a smaller
    # split.
    paths = [_download(repository, name) for name in reversed(names)][::-1]
    return ParquetTable.open(
        paths,
        name=f"{repository.where}, {dataset.subset}/{dataset.split}",
        commit=repository.commit,
        folder=paths[0].parents[names[0].count("/")],
    )


def open_hub_datasets(dataset: DatasetConfig) -> ArrowTable:
    """Load the subset and split with `datasets`; its memory-mapped Arrow files are read directly.

    If the hub is unreachable, the caches of the hub and of `datasets` are read.

    Raises:
        DatasetError: When `datasets` cannot load it; the message has its reason.
    """
    commit, trouble = _commit(dataset)
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with quiet(downloads=True), offline() if trouble is not None else contextlib.nullcontext():
            loaded = datasets.load_dataset(
                dataset.repo_id, name=dataset.subset, split=dataset.split, revision=commit or dataset.revision
            )
    except Exception as error:  # `datasets` passes on any error of its readers
        if isinstance(error, MemoryError):
            raise
        raise DatasetError(_not_loaded(dataset, commit, trouble, error)) from error
    data = loaded.data.table
    return ArrowTable(_place(dataset, commit), data.num_rows, tuple(data.column_names), commit, None, data)


def _place(dataset: DatasetConfig, commit: str | None) -> str:
    return f"{dataset.repo_id} at {(commit or 'an unknown commit')[:12]}, {dataset.subset}/{dataset.split}"


def _not_loaded(
    dataset: DatasetConfig, commit: str | None, trouble: HubError | None, error: Exception
) -> str:
    """Return why `datasets` failed: the hub's problem, else the config's."""
    if trouble is None and is_connection_problem(error):
        trouble = problem_of(error)
    if trouble is not None and (commit is None or is_connection_problem(error)):
        return _named(dataset).explain(trouble)
    return (
        f"{_place(dataset, commit)}: datasets cannot load it ({type(error).__name__}: {one_line(error)}); "
        "correct dataset.repo_id, dataset.subset, dataset.split or dataset.revision"
    )


def _locate(dataset: DatasetConfig) -> _Repository:
    """Ask the hub, else its cache, for the commit and the files of the repository.

    Raises:
        HubError: When the hub refuses, or is unreachable and the cache is empty.
    """
    try:
        info = ask("dataset", dataset.repo_id, dataset.revision)
    except HubError as error:
        if error.problem != "unreachable":
            raise
        try:
            folder = _cache_folder(dataset, cached_only=True)
        except (OSError, ValueError):
            raise error from None
        cached = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return _Repository(dataset.repo_id, folder.name, tuple(cached), cached_only=True)
    if not _COMMIT.fullmatch(dataset.revision or ""):
        # Downloads by commit do not record which commit the branch has. An unwritable cache only loses this.
        with contextlib.suppress(OSError):
            _cache_folder(dataset, cached_only=False)
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return _Repository(dataset.repo_id, str(info.sha), names, cached_only=False)


def _cache_folder(dataset: DatasetConfig, *, cached_only: bool) -> Path:
    """Return the revision's folder in the hub cache, and record the revision's commit there; no file."""
    from huggingface_hub import snapshot_download

    with quiet():
        return Path(
            snapshot_download(
                dataset.repo_id,
                repo_type="dataset",
                revision=dataset.revision,
                local_files_only=cached_only,
                allow_patterns=[_NO_FILE],
            )
        )


def _commit(dataset: DatasetConfig) -> tuple[str | None, HubError | None]:
    """Return the commit of the revision, None if unknown, and the error if the hub was unreachable.

    Raises:
        DatasetError: When the hub refuses.
    """
    try:
        found = _locate(dataset)
    except HubError as error:
        if error.problem != "unreachable":
            raise DatasetError(_named(dataset).explain(error)) from error
        # The hub cache is empty, but `datasets` has its own cache.
        pinned = dataset.revision if _COMMIT.fullmatch(dataset.revision or "") else None
        return pinned, error
    return found.commit, HubError("unreachable", "no answer") if found.cached_only else None


def _download(repository: _Repository, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with quiet(downloads=True):
            return Path(
                hf_hub_download(
                    repository.repo_id,
                    name,
                    repo_type="dataset",
                    revision=repository.commit,
                    local_files_only=repository.cached_only,
                )
            )
    except Exception as error:  # network, hub and disk raise many types
        if isinstance(error, MemoryError):
            raise
        raise DatasetError(
            f"{repository.where}: {name} cannot be downloaded ({type(error).__name__}: {one_line(error)}); "
            "check the connection and the free disk space of the hub cache (HF_HOME), then run again"
        ) from error


def _named(dataset: DatasetConfig) -> Named:
    keys = "dataset.repo_id", "dataset.revision", "local files in dataset.path"
    return Named("dataset", dataset.repo_id, dataset.revision, *keys)
