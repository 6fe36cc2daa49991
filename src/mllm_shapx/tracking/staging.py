"""Copies of a run's files on this machine, for libraries that take paths."""

from pathlib import Path

from mllm_shapx.records.runs import RunRecords


def stage(records: RunRecords, paths: list[str], folder: Path) -> list[Path]:
    """Copy files of a run into `folder`, in the same folders below it; return the copies.

    The copies do not change when the originals do, and the originals may be in a cloud's storage.

    Args:
        records: The run's files.
        paths: Paths below the run's directory.
        folder: A folder of this machine; made where it is missing.

    Raises:
        StorageError: When a file cannot be read.
    """
    copies = []
    for path in paths:
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(records.storage.read_bytes(f"{records.run_name}/{path}"))
        copies.append(copy)
    return copies


def summary_files(records: RunRecords) -> list[str]:
    """Return the JSON files of the run's summaries, below its directory."""
    names = records.storage.list(records.layout.summary_folder)
    return [f"summary/{name}" for name in names if name.endswith(".json")]


def sample_files(records: RunRecords) -> list[str]:
    """Return the files of the run's samples, below its directory."""
    names = records.storage.list(records.layout.samples)
    return [f"samples/{name}" for name in names if name.endswith(".json")]
