"""Finding out which model a config names, and that it is one, without loading it."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_shapx.data.hub_access import HubError, Named, ask, stay_offline
from mllm_shapx.errors import ModelError

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_LOOKS_LIKE_PATH = ("/", "./", "../", "~")
_CHUNK = 1 << 20

MODEL_DIRECTORY = (
    "a model directory holds config.json, the weights (model.safetensors, or several with an index) and the "
    "tokenizer (tokenizer.json, tokenizer_config.json)"
)


def local_directory(written: str, candidate: Path) -> Path | None:
    """Return the directory that `model_id` names, None when it is a hub id.

    Args:
        written: `model_id` as the config has it.
        candidate: Where that is as a path.

    Raises:
        ModelError: When it is a path but no model directory.
    """
    if candidate.is_dir():
        _check_directory(written, candidate)
        return candidate
    if candidate.exists():
        raise ModelError(
            f"connector_kwargs.model_id: {written!r} is a file; name the directory: {MODEL_DIRECTORY}"
        )
    if written.startswith(_LOOKS_LIKE_PATH) or not _is_hub_name(written):
        raise ModelError(
            f"connector_kwargs.model_id: there is no directory {written!r} (looked at {candidate}); "
            f"{MODEL_DIRECTORY}, or name a hub id such as 'microsoft/phi-2'"
        )
    return None


def _is_hub_name(written: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", written) is not None


def _check_directory(written: str, directory: Path) -> None:
    missing = []
    if not (directory / "config.json").is_file():
        missing.append("config.json")
    if not any(next(directory.glob(pattern), None) for pattern in _WEIGHTS):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ModelError(
            f"connector_kwargs.model_id: directory {written!r} is not a model, for lack of "
            f"{' and '.join(missing)}; {MODEL_DIRECTORY}"
        )


def directory_digest(directory: Path) -> str:
    """Return the sha256 over the names, sizes and contents of a directory's files, as 64 hex digits.

    Hidden files and folders (such as download caches) are left out. Files are read a piece at a time.
    """
    total = hashlib.sha256()
    for path in sorted(_files(directory), key=lambda each: each.relative_to(directory).as_posix()):
        total.update(f"{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
    return total.hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden:
            yield path


def hub_commit(repo_id: str, revision: str | None) -> str:
    """Return the commit of `repo_id` at `revision`, asking the hub; offline, the commit in the local cache.

    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured. Nothing is downloaded.

    Raises:
        ModelError: When there is no such repository or revision, it is no model, or the hub cannot be
            reached and the cache does not know it.
    """
    try:
        found = ask("model", repo_id, revision)
    except HubError as error:
        cached = _cached_commit(repo_id, revision) if error.problem == "unreachable" else None
        if cached is None:
            raise ModelError(_explain(repo_id, revision, error)) from error
        stay_offline()
        return cached
    _check_listing(f"connector_kwargs.model_id: {repo_id!r}", found)
    return str(found.sha)


def _explain(repo_id: str, revision: str | None, error: HubError) -> str:
    named = f"connector_kwargs.model_id: {repo_id!r}"
    if error.problem == "name":
        return f"{named} is neither a directory nor a hub id; {MODEL_DIRECTORY}"
    keys = "connector_kwargs.model_id", "connector_kwargs.revision", "a local directory"
    here = " is no directory here, and" if error.problem == "missing" else ":"
    return f"{named}{here} {Named('model', repo_id, revision, *keys).reason(error)}"


def _check_listing(named: str, found: Any) -> None:
    names = {file.rfilename for file in found.siblings or ()}
    if names and "config.json" not in names:
        raise ModelError(f"{named} on the hub is not a transformers model: it has no config.json")


def _cached_commit(repo_id: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None
