"""Checks the files of a model directory before loading: their contents and completeness.

Reads headers and small files only, and imports no torch.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

from mllm_shapx.errors import ModelError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024
"""Upper bound for a Git LFS pointer, which has about 130 bytes."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})
"""Files that trainers write beside the weights."""
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def has_weights(directory: Path) -> bool:
    """Return whether a directory holds weights of a whole model; adapter weights do not count."""
    found = (path.name for pattern in _WEIGHTS for path in directory.glob(pattern))
    return any(name not in _NO_WEIGHTS and name not in _ADAPTER_WEIGHTS for name in found)


def has_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


def has_adapter_weights(directory: Path) -> bool:
    """Return whether a directory holds the weights of an adapter."""
    return any((directory / name).is_file() for name in _ADAPTER_WEIGHTS)


def read_json(named: str, path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; `named` is the config's key with its value.

    Raises:
        ModelError: When the file cannot be read or is not a JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{named}: {path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{named}: {path.name} is not JSON ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{named}: {path.name} holds no JSON object; download or save it again")
    return found


def check_files(named: str, directory: Path) -> None:
    """Refuse incomplete files in the directory of a model or adapter; `named` is its key with its value.

    These are Git LFS pointers, truncated weights, and an index without all of its shards.

    Raises:
        ModelError: With the file's name and the fix.
    """
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if _is_pointer(path):
            raise ModelError(
                f"{named}: {path.name} is a Git LFS pointer and not the file itself; "
                "run `git lfs pull` in that directory, or download the model again"
            )
        if path.suffix == ".safetensors":
            _check_safetensors(named, path)
        elif path.suffix == ".bin":
            _check_archive(named, path)
        elif path.name.endswith(".index.json"):
            _check_shards(named, path)


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > _POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _check_safetensors(named: str, path: Path) -> None:
    """Read the header, which says how long the file is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(
            f"{named}: {path.name} ({path.stat().st_size:,} bytes) is truncated, damaged or not a "
            f"safetensors file ({error}); download or save it again"
        ) from error


def _check_archive(named: str, path: Path) -> None:
    """Refuse a PyTorch file that begins like a ZIP archive but does not end like one."""
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):
        raise ModelError(f"{named}: {path.name} is truncated; download or save it again")


def _check_shards(named: str, index: Path) -> None:
    shards = read_json(named, index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    missing = sorted(str(name) for name in names if not (index.parent / str(name)).is_file())
    if missing:
        raise ModelError(
            f"{named}: {len(missing)} of {len(names)} weight files that {index.name} lists are missing, such "
            f"as {missing[0]}; download them again"
        )
