"""Identifies the model and encoder of a config, and detects changed files; loads nothing."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.models import EmbeddingConfig
from mllm_shapx.data.hub_access import HubError, Named, ask, in_time, stay_offline
from mllm_shapx.errors import ModelChangedError, ModelError
from mllm_shapx.models.checkpoint_files import ADAPTER_CONFIG, CONFIG, has_weights

MODEL_ID = "connector_kwargs.model_id"
ADAPTER = "connector_kwargs.adapter"
ENCODER = "embedding.model_id"
_ENCODER_WEIGHTS = ("*.safetensors", "*.bin")
_LOOKS_LIKE_PATH = ("/", "./", "../", "~")
_CHUNK = 1 << 20
_SETTLED_S = 2.0
"""Seconds; a younger file may change without new time stamps."""

MODEL_DIRECTORY = (
    "a model directory holds config.json, the weights (model.safetensors, or several with an index) and the "
    "tokenizer (tokenizer.json, tokenizer_config.json)"
)


def local_directory(written: str, candidate: Path, key: str = MODEL_ID) -> Path | None:
    """Return the directory that a config key names, None when it is a hub id.

    Args:
        written: The key's value.
        candidate: That value as a path.
        key: The key, for messages.

    Raises:
        ModelError: When it is a path but not a directory.
    """
    if candidate.is_dir():
        return candidate
    if candidate.suffix == ".gguf" and candidate.exists():
        raise ModelError(
            f"{key}: {written!r} is a GGUF file; name its directory, and in connector_kwargs.gguf_file "
            f"{candidate.name!r}"
        )
    if candidate.exists():
        raise ModelError(f"{key}: {written!r} is a file; name the directory: {MODEL_DIRECTORY}")
    if written.startswith(_LOOKS_LIKE_PATH) or not _is_hub_name(written):
        raise ModelError(
            f"{key}: there is no directory {written!r} (looked at {candidate}); "
            f"{MODEL_DIRECTORY}, or name a hub id such as 'microsoft/phi-2'"
        )
    return None


def _is_hub_name(written: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", written) is not None


def check_model_directory(named: str, directory: Path) -> None:
    """Refuse a directory without config.json or weights.

    Args:
        named: The config's key and value, for the message.
        directory: The local directory.

    Raises:
        ModelError: With the missing file.
    """
    missing = []
    if not (directory / CONFIG).is_file():
        missing.append(CONFIG)
    if not has_weights(directory):
        missing.append("weights (*.safetensors)")
    if missing:
        other = next((path.name for path in sorted(directory.glob("*.gguf"))), None)
        hint = "" if other is None else f"; to load {other}, name it in connector_kwargs.gguf_file"
        raise ModelError(
            f"{named} is not a model, for lack of {' and '.join(missing)}; {MODEL_DIRECTORY}{hint}"
        )


def directory_digest(directory: Path, *, gguf_file: str | None = None) -> str:
    """Return the sha256 over the names, sizes and contents of a directory's files, as 64 hex digits.

    Skips hidden files and folders (such as download caches) and follows links.

    Args:
        directory: The local directory.
        gguf_file: The loaded GGUF file; other GGUF files (usually other quantizations) do not count.

    Raises:
        ModelError: When a file cannot be read.
    """
    total = hashlib.sha256()
    try:
        for name, path in sorted(files_below(directory)):
            if gguf_file is not None and name.endswith(".gguf") and name != gguf_file:
                continue
            total.update(f"{name}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    total.update(chunk)
    except OSError as error:
        raise ModelError(f"model directory {directory}: {error.filename}: {error.strerror}") from error
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of one file's content, as 64 hex digits.

    Raises:
        ModelError: When it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{MODEL_ID}: {path}: {error.strerror}") from error


def files_below(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the relative name and the path of every file of a model's directory.

    Follows links. Skips hidden files and folders and Python's caches.
    """
    above: dict[str, frozenset[str]] = {}
    for folder, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        ancestors = above.pop(folder, frozenset())
        if real in ancestors:  # a link to a parent folder
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        above.update((os.path.join(folder, name), ancestors | {real}) for name in folders)  # noqa: PTH118
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(directory).as_posix(), path


def hub_commit(repo_id: str, revision: str | None, key: str = MODEL_ID, holds: str = CONFIG) -> str:
    """Return the commit of `repo_id` at `revision` from the hub; offline, from the local cache.

    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured. Nothing is downloaded.

    Args:
        repo_id: The repository.
        revision: Its branch, tag or commit; None for the main branch.
        key: The config key that names it.
        holds: A file that the repository must contain.

    Raises:
        ModelError: When the repository or revision does not exist or is not a model, or the hub is
            unreachable and the cache lacks it.
    """
    try:
        found = ask("model", repo_id, revision)
    except HubError as error:
        cached = _cached_commit(repo_id, revision, holds) if error.problem == "unreachable" else None
        if cached is None:
            raise ModelError(_explain(repo_id, revision, error, key)) from error
        stay_offline()
        return cached
    _check_listing(f"{key}: {repo_id!r}", found, holds)
    return str(found.sha)


def _explain(repo_id: str, revision: str | None, error: HubError, key: str) -> str:
    named = f"{key}: {repo_id!r}"
    if error.problem == "name":
        return f"{named} is neither a directory nor a hub id; {MODEL_DIRECTORY}"
    revision_key = f"{key.removesuffix('model_id')}revision" if key.endswith("model_id") else key
    keys = key, revision_key, "a local directory"
    here = " is no directory here, and" if error.problem == "missing" else ":"
    return f"{named}{here} {Named('model', repo_id, revision, *keys).reason(error)}"


def _check_listing(named: str, found: Any, holds: str) -> None:
    names = {file.rfilename for file in found.siblings or ()}
    if holds == ADAPTER_CONFIG and names and ADAPTER_CONFIG not in names:
        raise ModelError(f"{named} on the hub is not an adapter of PEFT: it has no {ADAPTER_CONFIG}")
    if holds != ADAPTER_CONFIG and ADAPTER_CONFIG in names:
        raise ModelError(
            f"{named} on the hub holds an adapter ({ADAPTER_CONFIG}); name its base model here, and the "
            f"adapter in {ADAPTER}"
        )
    if names and holds not in names:
        raise ModelError(f"{named} on the hub is not a transformers model: it has no {holds}")


def _cached_commit(repo_id: str, revision: str | None, holds: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, holds, revision=revision)
    return Path(cached).parents[len(Path(holds).parts) - 1].name if isinstance(cached, str) else None


def hub_file(repo_id: str, commit: str, name: str) -> Path | None:
    """Return a small file of a hub repository, downloaded if needed; None on an error or a timeout."""
    from huggingface_hub import hf_hub_download

    def fetch() -> Path | None:
        try:
            return Path(hf_hub_download(repo_id, name, revision=commit))
        except Exception:  # noqa: BLE001 -- HTTP clients differ; loading reports the error
            return None

    return in_time(fetch)


@dataclass(frozen=True, slots=True)
class Version:
    """The version of a model's files, for comparison with the loaded files."""

    key: str
    """The config key that names it."""
    directories: tuple[Path, ...]
    """The local directories of the files; empty for a hub commit."""
    commit: str
    """Digest of the directories, or hub commit."""
    stamp: str = ""
    """See `stamp_of`."""

    @classmethod
    def of(cls, key: str, directories: Sequence[Path], digest: Callable[[], str]) -> "Version":
        """Return the version with the commit from `digest`.

        Raises:
            ModelError: When files changed during reading.
        """
        before = _facts(directories)
        commit = digest()
        if _facts(directories) != before:
            raise ModelError(
                f"{key}: files in {_named(directories)} changed while they were read; wait until whatever "
                "writes them has ended, or give the study a copy"
            )
        return cls(key, tuple(directories), commit, stamp_of(directories))

    def loaded[T](self, load: Callable[[], T], digest: Callable[[], str]) -> T:
        """Return the result of `load` after checking that the files are this version.

        Files with this version's stamp are not read again.

        Raises:
            ModelChangedError: When the files have changed, or changed during loading.
        """
        before = _facts(self.directories)
        result = load()
        is_known = bool(self.stamp) and stamp_of(self.directories) == self.stamp
        if self.directories and (_facts(self.directories) != before or not (is_known or self._holds(digest))):
            raise ModelChangedError(
                f"{self.key}: the files in {_named(self.directories)} are not the ones that the study began "
                "with: something has written to them since. No answer of the new files was kept. Put the old "
                "files back and go on with --resume, or explain the new ones under another "
                "experiment_set_id. Give a study a copy of a directory that a training job writes to"
            )
        return result

    def _holds(self, digest: Callable[[], str]) -> bool:
        return digest() == self.commit


def stamp_of(directories: Sequence[Path]) -> str:
    """Return a hash of the names, sizes, times and inodes of the directories' files; opens no file.

    Equal stamps mean equal contents: every write changes the inode's time, which no program can set. The
    stamp is empty, and proves nothing, while a file is younger than two seconds.
    """
    facts = _facts(directories)
    youngest = max((max(fact[2], fact[3]) for fact in facts), default=0) / 1e9
    if not facts or time.time() - youngest < _SETTLED_S:
        return ""
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()


def _facts(directories: Sequence[Path]) -> list[tuple[str, int, int, int, int, int]]:
    """Return name, size, times, inode and device of every file."""
    found = []
    for path in sorted(path for directory in directories for _, path in files_below(directory)):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # being replaced; the next call sees the new file
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append((str(path), status.st_size, *times, status.st_ino, status.st_dev))
    return found


def _named(directories: Sequence[Path]) -> str:
    return " and ".join(map(str, directories))


def encoder_version(config: EmbeddingConfig, config_path: Path | None, key: str = ENCODER) -> Version:
    """Return the version of an encoder: digest of its directory, or hub commit.

    A relative directory is looked up in the working directory, then in the config's folder.

    Raises:
        ModelError: When the directory or hub repository does not exist or is not a model.
    """
    directory = _encoder_directory(config.model_id, resolve_path(config.model_id, config_path), key)
    if directory is not None:
        return Version.of(key, (directory.resolve(),), lambda: directory_digest(directory))
    if config.local_files_only:
        return Version(key, (), _cached_encoder(config))
    return Version(key, (), hub_commit(config.model_id, config.revision, key))


def check_encoder(config: EmbeddingConfig, config_path: Path, key: str = ENCODER) -> str | None:
    """Check that an encoder exists, without reading a directory's files.

    Returns:
        A warning when the hub is unreachable.

    Raises:
        ModelError: When the directory or hub repository does not exist or is not a model.
    """
    if _encoder_directory(config.model_id, resolve_path(config.model_id, config_path), key) is not None:
        return None
    try:
        encoder_version(config, config_path, key)
    except ModelError as error:
        if not (isinstance(error.__cause__, HubError) and error.__cause__.problem == "unreachable"):
            raise
        return f"not checked: {error}"
    return None


def _encoder_directory(written: str, candidate: Path, key: str) -> Path | None:
    """Return the directory of `embedding.model_id`, None for a hub id."""
    if not candidate.exists():
        if written.startswith(("/", "./", "../", "~")) or written.count("/") > 1:
            raise ModelError(
                f"{key}: there is no directory {written!r} (looked at {candidate}); name one, or a hub "
                "id such as 'sentence-transformers/all-MiniLM-L6-v2'"
            )
        return None
    missing = [] if (candidate / "config.json").is_file() else ["config.json"]
    if not any(next(candidate.glob(pattern), None) for pattern in _ENCODER_WEIGHTS):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ModelError(f"{key}: {written!r} is no encoder, for lack of {' and '.join(missing)}")
    return candidate


def _cached_encoder(config: EmbeddingConfig) -> str:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.model_id, "config.json", revision=config.revision)
    if isinstance(cached, str):
        return Path(cached).parent.name
    raise ModelError(
        f"{ENCODER}: {config.model_id!r} is neither a directory nor in the local hub cache, and "
        "embedding.local_files_only forbids to ask the hub; download it once, or correct the name"
    )
