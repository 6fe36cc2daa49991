"""Finds the files of an `hf_text` model and checks them against the config; imports no torch.

A model is a base and, optionally, a PEFT adapter on it. Its commit is the base's, or `BASE+ADAPTER`.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_shapx.config.loading import resolve_path
from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError
from mllm_shapx.models.checkpoint_files import (
    ADAPTER_CONFIG,
    CONFIG,
    check_files,
    has_adapter,
    has_adapter_weights,
    has_weights,
    read_json,
)
from mllm_shapx.models.generation_settings import GENERATION_FILE, check_generation_file
from mllm_shapx.models.identity import (
    ADAPTER,
    MODEL_ID,
    check_model_directory,
    directory_digest,
    hub_commit,
    hub_file,
    local_directory,
)

TRUST = "connector_kwargs.trust_remote_code"
_GGUF = "connector_kwargs.gguf_file"
_BASE = "base_model_name_or_path"
_IGNORED_WHEN_BROKEN = ("generation_config.json", "tokenizer_config.json")
"""Files that transformers silently ignores when they are not JSON."""
_MASKED = ("ForMaskedLM", "ForPreTraining")
_CAUSAL = "hf_text takes causal language models only"


@dataclass(frozen=True, slots=True)
class Place:
    """Location of files: a local directory, or a repository of the hub."""

    key: str
    """The config key."""
    written: str
    """The key's value: a path or hub id."""
    directory: Path | None
    """The local directory; None for a hub id."""
    revision: str | None = None
    """Requested branch, tag or commit; None for a directory."""

    @property
    def named(self) -> str:
        """Return key and value, for messages."""
        return f"{self.key}: {'' if self.directory is None else 'directory '}{self.written!r}"

    @property
    def source(self) -> str:
        """Return the argument for transformers: a path or hub id."""
        return self.written if self.directory is None else str(self.directory)


@dataclass(frozen=True, slots=True)
class TextSource:
    """The base and the adapter of a text model."""

    base: Place
    adapter: Place | None


def text_source(settings: ModelSettings, directory: Path | None, config_path: Path | None) -> TextSource:
    """Return the locations of a model's base and adapter.

    A relative `adapter` is resolved like a relative `model_id`. If a directory holds only an adapter, its
    adapter_config.json names the base: an absolute path, a path relative to the adapter's directory or to the
    working directory, or a hub id.

    `directory` is that of `model_id`; None for a hub id.

    Raises:
        ModelError: When a directory does not exist, or holds both a model and an adapter.
    """
    named = Place(MODEL_ID, settings.model_id, directory, settings.revision if directory is None else None)
    written = settings.kwargs.adapter
    if directory is not None and has_adapter(directory):
        if has_weights(directory) or settings.kwargs.gguf_file is not None:
            raise ModelError(
                f"{named.named} holds a model and an adapter ({ADAPTER_CONFIG}) side by side; move the "
                f"adapter's files to a directory of their own, and name that in {ADAPTER} to use it"
            )
        if written is not None:
            raise ModelError(
                f"{named.named} holds an adapter and no model; name the base model there, or remove {ADAPTER}"
            )
        return TextSource(_base_of(named, settings), named)
    if written is None:
        return TextSource(named, None)
    found = local_directory(written, resolve_path(written, config_path), ADAPTER)
    if found is not None and not has_adapter(found):
        raise ModelError(
            f"{ADAPTER}: directory {written!r} is no adapter of PEFT: it has no {ADAPTER_CONFIG}"
        )
    return TextSource(named, Place(ADAPTER, written, found))


def _base_of(adapter: Place, settings: ModelSettings) -> Place:
    assert adapter.directory is not None  # noqa: S101 -- for the type checker
    config = read_json(adapter.named, adapter.directory / ADAPTER_CONFIG)
    written = config.get(_BASE)
    if not isinstance(written, str) or not written:
        raise ModelError(
            f"{adapter.named} holds an adapter whose {ADAPTER_CONFIG} names no {_BASE}; "
            f"name the base model in {MODEL_ID} and the adapter in {ADAPTER}"
        )
    key = f"{_BASE} of {MODEL_ID} {adapter.written!r}"
    beside = adapter.directory / Path(written).expanduser()
    found = local_directory(written, beside if beside.is_dir() else Path(written).expanduser(), key)
    if found is not None and has_adapter(found):
        raise ModelError(
            f"{key}: directory {written!r} holds an adapter itself; merge it into its base first"
        )
    revision = settings.kwargs.revision or config.get("revision")
    return Place(key, written, found, None if found is not None else revision)


def text_commit(source: TextSource, settings: ModelSettings) -> str:
    """Check the files without loading; return the commit: the base's, or `BASE+ADAPTER`.

    Raises:
        ModelError: When files are incomplete, the model is not causal, or an extra is not installed.
    """
    kwargs = settings.kwargs
    if kwargs.quantization is not None:
        need("bitsandbytes", "quantization", f"connector_kwargs.quantization: {kwargs.quantization!r}")
    if kwargs.gguf_file is not None:
        need("gguf", "gguf", f"{_GGUF}: {kwargs.gguf_file!r}")
    commit = base_commit(source.base, kwargs.gguf_file)
    if kwargs.gguf_file is None:
        _check_config(source.base, commit, trusted=kwargs.trust_remote_code)
    if source.adapter is None:
        return commit
    return f"{commit}+{_adapter_commit(source.adapter)}"


def need(package: str, extra: str, named: str) -> None:
    """Refuse `named`, a connector or a key with its value, when the package that it needs is missing.

    Raises:
        ModelError: It names the extra of mllm-shapx that installs the package.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{named} needs the package {package}, which is not installed: pip install 'mllm-shapx[{extra}]'"
        )


def base_commit(base: Place, gguf_file: str | None = None) -> str:
    """Check the files of a whole model; return the digest of its directory, or its hub commit.

    Raises:
        ModelError: When files are missing, incomplete or broken, or the hub lacks the model.
    """
    if base.directory is None:
        return hub_commit(base.written, base.revision, base.key, gguf_file or CONFIG)
    if gguf_file is None:
        check_model_directory(base.named, base.directory)
        check_files(base.named, base.directory)
        for name in _IGNORED_WHEN_BROKEN:
            if (base.directory / name).exists():
                read_json(base.named, base.directory / name)
    else:
        _check_gguf(base.directory / PurePosixPath(gguf_file), gguf_file)
    return directory_digest(base.directory, gguf_file=gguf_file)


def _check_gguf(path: Path, written: str) -> None:
    if not path.is_file():
        raise ModelError(f"{_GGUF}: there is no file {written!r} in the model's directory (looked at {path})")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{_GGUF}: {written!r} is not a GGUF file; download it again")


def _adapter_commit(adapter: Place) -> str:
    need("peft", "peft", adapter.named)
    if adapter.directory is None:
        return hub_commit(adapter.written, adapter.revision, adapter.key, ADAPTER_CONFIG)
    read_json(adapter.named, adapter.directory / ADAPTER_CONFIG)
    if not has_adapter_weights(adapter.directory):
        raise ModelError(f"{adapter.named} holds no weights of an adapter (adapter_model.safetensors)")
    check_files(adapter.named, adapter.directory)
    return directory_digest(adapter.directory)


def _check_config(base: Place, commit: str, *, trusted: bool) -> None:
    path, generation = (
        hub_file(base.written, commit, name) if base.directory is None else base.directory / name
        for name in (CONFIG, GENERATION_FILE)
    )
    if generation is not None:
        check_generation_file(generation)
    if path is not None:
        config = read_json(base.named, path)
        _check_is_causal(base.named, config)
        if not trusted:
            _check_is_known(base.named, config)


def _check_is_causal(named: str, config: dict[str, Any]) -> None:
    """Refuse models that cannot generate; the weights of some would load without an error."""
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{named} is an encoder-decoder model ({kind}); {_CAUSAL}")
    architectures = config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(name.endswith(_MASKED) for name in names) and not config.get("is_decoder"):
        raise ModelError(
            f"{named} is a masked language model ({names[0]}), which generates no text; {_CAUSAL}"
        )


def _check_is_known(named: str, config: dict[str, Any]) -> None:
    """Refuse a model with custom code, unless transformers has code for it."""
    code = config.get("auto_map")
    if not isinstance(code, dict) or not {"AutoConfig", "AutoModelForCausalLM"} & code.keys():
        return
    # These imports take seconds.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{named} needs code of its own (auto_map in {CONFIG}, model_type {kind!r}), which runs with "
            f"your rights; read it, and set {TRUST} to true to allow it"
        )
