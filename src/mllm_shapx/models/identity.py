"""Finding out which model a config names, and that it is one, without loading it."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_shapx.errors import ModelError

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_LOOKS_LIKE_PATH = ("/", "./", "../", "~")
_CHUNK = 1 << 20
_TIMEOUT_S = 20.0

MODEL_DIRECTORY = (
    "a model directory holds config.json, the weights (model.safetensors, or several with an index) and the "
    "tokenizer (tokenizer.json, tokenizer_config.json)"
)


def local_directory(written: str, candidate: Path, gguf_file: str | None = None) -> Path | None:
    """Return the directory that `model_id` names, None when it is a hub id.

    Args:
        written: `model_id` as the config has it.
        candidate: Where that is as a path.
        gguf_file: Name of the one file of it that holds the model.

    Raises:
        ModelError: When it is a path but no model directory.
    """
    if candidate.is_dir():
        if gguf_file is None:
            _check_directory(written, candidate)
        elif not (candidate / gguf_file).is_file():
            raise ModelError(
                f"connector_kwargs.gguf_file: directory {written!r} holds no file {gguf_file!r}; "
                "name one of its *.gguf files"
            )
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


def directory_digest(directory: Path, gguf_file: str | None = None) -> str:
    """Return the sha256 over the names, sizes and contents of a directory's files, as 64 hex digits.

    Of a directory with a `gguf_file` this file alone counts. Hidden files and folders (such as download
    caches) are left out. Files are read a piece at a time.
    """
    total = hashlib.sha256()
    files = _files(directory) if gguf_file is None else [directory / gguf_file]
    for path in sorted(files, key=lambda each: each.relative_to(directory).as_posix()):
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
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    named = f"connector_kwargs.model_id: {repo_id!r}"
    try:
        found = HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT_S)
    except HFValidationError as error:
        raise ModelError(f"{named} is neither a directory nor a hub id; {MODEL_DIRECTORY}") from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{named} has no revision {revision!r} on the hub; "
            "set connector_kwargs.revision to one of its commits"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{named}: there is no such directory here and no such model on the hub, or it is private: "
            "check the name, or set HF_TOKEN"
        ) from error
    except Exception as error:  # noqa: BLE001 -- HTTP clients differ: the hub gave no answer
        return _cached_commit(repo_id, revision, error)
    _check_listing(named, found)
    return str(found.sha)


def _check_listing(named: str, found: Any) -> None:
    names = {file.rfilename for file in found.siblings or ()}
    if names and "config.json" not in names:
        raise ModelError(f"{named} on the hub is not a transformers model: it has no config.json")


def _cached_commit(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent.name
    raise ModelError(
        f"connector_kwargs.model_id: {repo_id!r} is not in the local hub cache, and the hub cannot be asked "
        f"({type(error).__name__}: {_first_line(error)}); connect once to download it, "
        "set HF_HOME to the cache that has it, or name a local directory"
    ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no answer")
