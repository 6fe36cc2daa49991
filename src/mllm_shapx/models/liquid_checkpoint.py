"""Loads the real LFM2-Audio model and processor from a hub commit or a directory."""

import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from mllm_shapx.errors import ModelError
from mllm_shapx.models.checkpoint_files import CONFIG, read_json

_LFM_ALIASES = {"block_ff_dim": "intermediate_size"}
"""Keys of old configs -> fields of `Lfm2Config`."""

_UNUSED = ("audio_embedding.to_logits.", "audio_embedding.embedding_norm.")
"""Weights that generation never reads; a checkpoint may lack them."""


def load_checkpoint(folder: Path, *, dtype: Any, device: Any, attn_implementation: str) -> tuple[Any, Any]:
    """Return the package's own `LFM2AudioModel` in evaluation mode, and its processor on the CPU.

    Raises:
        ModelError: When the package is missing or the folder is not an LFM2-Audio checkpoint.
    """
    config = read_config(folder)
    from safetensors import SafetensorError

    try:
        model = _build_model(folder, config, dtype, device)
        model.lfm.set_attn_implementation(attn_implementation)
        processor = _build_processor(folder, config)
    except ImportError as error:
        raise ModelError(
            f"connector 'liquid_audio' needs the audio extra: pip install 'mllm-shapx[audio]' ({error})"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise ModelError(f"{folder}: the model does not fit into the memory of {device}") from error
        raise ModelError(
            f"{folder} is not a complete LFM2-Audio checkpoint: {type(error).__name__}: {error}"
        ) from error
    if config["lfm"].get("conv_bias"):
        # A biased projection would turn zeroed padding into non-zero states.
        raise ModelError(f"{folder}: LFM2 models with conv_bias cannot be padded into batches")
    return model, processor


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's `config.json`, repaired.

    Raises:
        ModelError: When it is missing, not JSON, or lacks the blocks of an LFM2-Audio config.
    """
    config = read_json(str(folder), folder / CONFIG)
    missing = [block for block in ("preprocessor", "encoder", "lfm", "depthformer") if block not in config]
    if missing:
        raise ModelError(
            f"{folder / CONFIG} is not the config of an LFM2-Audio model: it lacks {', '.join(missing)}; "
            "a text model goes with connector 'hf_text'"
        )
    return repaired(config)


def repaired(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with whole floats converted to integers where the fields are integers.

    Published configs contain such numbers (`12288.0`); newer validators refuse them. The file stays
    unchanged.
    """
    from liquid_audio.model.lfm2_audio import LFM2AudioConfig

    blocks = {name: repaired_block(config[name], kind) for name, kind in _kinds_of_blocks().items()}
    return {**repaired_block(config, LFM2AudioConfig), **blocks}


def _kinds_of_blocks() -> dict[str, Any]:
    from liquid_audio.model.conformer.encoder import ConformerEncoderConfig
    from liquid_audio.model.lfm2_audio import DepthformerConfig
    from liquid_audio.processor import PreprocessorConfig
    from transformers import Lfm2Config

    return {
        "preprocessor": PreprocessorConfig,
        "encoder": ConformerEncoderConfig,
        "depthformer": DepthformerConfig,
        "lfm": Lfm2Config,
    }


def repaired_block(block: dict[str, Any], kind: type) -> dict[str, Any]:
    """Return `block` with whole floats converted to integers for integer fields of the class `kind`."""
    import torch

    # transformers names torch without importing it.
    hints = typing.get_type_hints(kind, localns={"torch": torch})
    integers = {field.name for field in fields(kind) if _is_integer(hints.get(field.name))}
    return {
        key: _as_integer(value) if _LFM_ALIASES.get(key, key) in integers else value
        for key, value in block.items()
    }


def _is_integer(hint: Any) -> bool:
    """Whether a field takes integers (or lists of them) and no floats."""
    leaves: set[Any] = set()
    todo = [hint]
    while todo:
        current = todo.pop()
        if typing.get_origin(current) in {typing.Union, types.UnionType, list}:
            todo.extend(typing.get_args(current))
        else:
            leaves.add(current)
    return int in leaves and float not in leaves


def _as_integer(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_integer(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _build_model(folder: Path, config: dict[str, Any], dtype: Any, device: Any) -> Any:
    """Build the model as the package's `from_pretrained` does, with our config and attention."""
    from accelerate import init_on_device, load_checkpoint_in_model
    from liquid_audio.model.lfm2_audio import LFM2AudioConfig, LFM2AudioModel

    blocks = {name: kind(**config[name]) for name, kind in _kinds_of_blocks().items()}
    with init_on_device(device, include_buffers=True):
        model = LFM2AudioModel(LFM2AudioConfig(**{**config, **blocks})).to(device=device, dtype=dtype)
    load_checkpoint_in_model(model, folder)
    _check_complete(model, folder)
    return model.eval()


def _check_complete(model: Any, folder: Path) -> None:
    """Refuse incomplete weights: missing ones would silently stay random."""
    from safetensors import safe_open

    stored: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    names: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), set()).add(name)  # tied weights are stored under one name
    needed = (group for group in names.values() if not min(group).startswith(_UNUSED))
    missing = sorted(min(group) for group in needed if not group & stored)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} the first of them")


def _build_processor(folder: Path, config: dict[str, Any]) -> Any:
    """Build the processor as the package's `from_pretrained` does; features are computed on the CPU."""
    from liquid_audio import LFM2AudioProcessor
    from liquid_audio.processor import PreprocessorConfig

    mimi = folder / "tokenizer-e351c8d8-checkpoint125.safetensors"
    detokenizer = folder / "audio_detokenizer"
    return LFM2AudioProcessor(
        text_tokenizer_path=str(folder),
        audio_processor_config=PreprocessorConfig(**config["preprocessor"]),
        mimi_weights_path=str(mimi) if mimi.exists() else None,
        detokenizer_path=str(detokenizer) if detokenizer.exists() else None,
        name=str(folder),
    ).eval()
