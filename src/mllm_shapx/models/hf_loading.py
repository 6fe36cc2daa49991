"""Loads a text model and its tokenizer with transformers; refuses missing or mismatched weights.

Tested on the CPU. Not tested on real GPUs: models spread over several GPUs, bitsandbytes quantization.
"""

import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError
from mllm_shapx.models.base import OutOfMemory
from mllm_shapx.models.devices import Placement
from mllm_shapx.models.text_source import TRUST, text_source

_NAMED = 3
"""Most weights named in a message."""
_LONGEST = 500
"""Most characters of a library's error in a message."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The files to load, and how."""

    source: str
    """Hub id or directory of the model."""
    revision: str | None = None
    """Hub commit."""
    adapter: str | None = None
    """Hub id or directory of a PEFT adapter."""
    adapter_revision: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None

    @classmethod
    def of(cls, settings: ModelSettings, directory: Path | None, commit: str | None) -> Self:
        """Return the files of a run's model.

        Args:
            settings: Model, adapter and loading options; a local adapter by its absolute path.
            directory: The local directory of `model_id`; None for a hub id.
            commit: The commit of the base, or `BASE+ADAPTER`; None for the newest.

        Raises:
            ModelError: When a directory does not exist, or holds both a model and an adapter.
        """
        options = settings.kwargs
        found = text_source(settings, directory, None)
        base, _, adapter = (commit or "").partition("+")
        is_hub_adapter = found.adapter is not None and found.adapter.directory is None
        return cls(
            found.base.source,
            revision=None if found.base.directory is not None else base or found.base.revision,
            adapter=None if found.adapter is None else found.adapter.source,
            adapter_revision=(adapter or None) if is_hub_adapter else None,
            quantization=options.quantization,
            trust_remote_code=options.trust_remote_code,
            gguf_file=options.gguf_file,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that choose the files of the model."""
        found = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return found if self.gguf_file is None else {**found, "gguf_file": self.gguf_file}


@dataclass(frozen=True, slots=True)
class LoadedText:
    """A model in evaluation mode, its tokenizer, and notes for the user."""

    model: Any
    tokenizer: Any
    notes: tuple[str, ...]


def load_text(
    files: TextFiles, placement: Placement, dtype: torch.dtype, attention: str | None = None
) -> LoadedText:
    """Load a causal language model and its tokenizer.

    Raises:
        ModelError: When they cannot be loaded, are incomplete, or do not match.
        OutOfMemory, torch.cuda.OutOfMemoryError: When the devices cannot hold the model.
    """
    import transformers

    # Several workers share a terminal: mixed progress bars and reports are unreadable.
    transformers.utils.logging.disable_progress_bar()
    if files.quantization is not None and placement.device.type != "cuda":
        raise ModelError(
            f"connector_kwargs.quantization: {files.quantization!r} needs CUDA (bitsandbytes), and the model "
            f"goes to {placement.device}; remove it, or run on a machine with an NVIDIA GPU"
        )
    with _quiet(transformers):
        _check_class(files, transformers)
        tokenizer = _load_tokenizer(files, transformers)
        model, notes = _load_model(files, placement, dtype, attention, transformers)
        if files.adapter is not None:
            model, note = _with_adapter(model, files)
            notes.append(note)
    _check_vocabulary(files, model, tokenizer)
    placement.check(model)
    return LoadedText(model.eval(), tokenizer, (*placement.notes(model), *notes))


def _check_class(files: TextFiles, transformers: Any) -> None:
    """Refuse a config that is not of a causal model; transformers' own message would list all classes."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    with _loading(files):
        config = transformers.AutoConfig.from_pretrained(files.source, **files.options)
    has_own_code = files.trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        names = ", ".join(getattr(config, "architectures", None) or ()) or "no architecture named"
        raise ModelError(
            f"connector 'hf_text' takes causal language models only, and model {files.source!r} is none that "
            f"transformers knows: model_type {config.model_type!r} ({names})"
        )
    # In the class of a decoder, each token of an encoder would attend to later ones.
    is_masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation"
    if is_masked and not getattr(config, "is_decoder", False) and not getattr(config, "causal", False):
        raise ModelError(
            f"connector 'hf_text': model {files.source!r} is a masked language model "
            f"(model_type {config.model_type!r}), which generates no text; hf_text takes causal language "
            "models only. If it was trained as a decoder, set is_decoder to true in its config.json"
        )


def _load_tokenizer(files: TextFiles, transformers: Any) -> Any:
    """Load the adapter's tokenizer if it has one, else the model's."""
    source, options = files.source, files.options
    if files.adapter is not None and _has_tokenizer(files.adapter, files.adapter_revision):
        source = files.adapter
        options = {"revision": files.adapter_revision, "trust_remote_code": files.trust_remote_code}
    with _loading(files):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer(source: str, revision: str | None) -> bool:
    from transformers.utils import cached_file

    found = cached_file(
        source,
        "tokenizer_config.json",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _load_model(
    files: TextFiles,
    placement: Placement,
    dtype: torch.dtype,
    attention: str | None,
    transformers: Any,
) -> tuple[Any, list[str]]:
    options = files.options
    if attention is not None:
        options["attn_implementation"] = attention
    if files.quantization is not None:
        bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
        if files.quantization == "8bit":
            bits = {"load_in_8bit": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
    with _loading(files):
        # Load straight to the device: main memory may not hold the weights of every worker.
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            files.source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_report` refuses them with a clear message
            **placement.options,
            **options,
        )
    _check_report(files, model, report)
    unused = sorted(report["unexpected_keys"])
    if not unused:
        return model, []
    return model, [f"model {files.source} holds {_listed('weight', unused)} that its class does not use"]


def _check_report(files: TextFiles, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse weights that are missing or of another shape: they would be random."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = set(report["missing_keys"])
    if getattr(model.config, "quantization_config", None) is None:
        missing &= weights  # missing buffers are computed
    faults = []
    if missing:
        faults.append(f"lacks {_listed('weight', sorted(missing))} of {len(weights)}")
    mismatched = {name: (stored, wanted) for name, stored, wanted in report["mismatched_keys"]}
    if mismatched:
        name = min(mismatched)
        stored, wanted = (tuple(shape) for shape in mismatched[name])
        faults.append(
            f"has {_listed('weight', sorted(mismatched))} in another shape than config.json says "
            f"({name}: {stored} instead of {wanted})"
        )
    if report["error_msgs"]:
        faults.append(_short(report["error_msgs"][0]))
    if faults:
        raise ModelError(
            f"connector 'hf_text': the checkpoint of model {files.source!r} {' and '.join(faults)}; "
            f"{type(model).__name__} would answer with random numbers in their place. Save the whole causal "
            "language model (not its inner `.model`), or correct config.json"
        )


def _check_vocabulary(files: TextFiles, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that have no embedding in the model.

    Special tokens for padding and unknown text may lack an embedding: neither a template nor ordinary text
    contains them.
    """
    rows = model.get_input_embeddings().num_embeddings
    vocabulary = tokenizer.get_vocab()
    beyond = {place for place in vocabulary.values() if place >= rows}
    idle = {place for place, added in tokenizer.added_tokens_decoder.items() if added.special}
    if beyond - (idle - _brought_in(tokenizer)):
        of = "the adapter's" if files.adapter is not None else "its"
        raise ModelError(
            f"connector 'hf_text': {of} tokenizer has {max(beyond) + 1} tokens and model {files.source!r} "
            f"has embeddings for {rows}; take the tokenizer that the model was trained with, or resize the "
            "embeddings (resize_token_embeddings) and save the model again"
        )


def _brought_in(tokenizer: Any) -> set[int | None]:
    """Return the tokens that prompts contain besides the user's text."""
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    chat = [{"role": "user", "content": "a"}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001 -- rendering the rows reports the template's error
        rendered = "a"
    return {*ends, *tokenizer(rendered)["input_ids"]}


def _with_adapter(model: Any, files: TextFiles) -> tuple[Any, str]:
    """Return the model with an adapter's layers in place, its class unchanged, and a note on it."""
    import peft

    with _loading(files, f"adapter {files.adapter!r} of model"), warnings.catch_warnings():
        # PEFT only warns about missing weights; they are compared below.
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, files.adapter, revision=files.adapter_revision)
        stored = peft.load_peft_weights(files.adapter, device="cpu", revision=files.adapter_revision)
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"connector 'hf_text': adapter {files.adapter!r} is a learned prompt "
            f"({adapted.active_peft_config.peft_type.value}), which is not supported; adapters that change "
            "layers (such as LoRA) are"
        )
    missing = sorted(expected.keys() - stored.keys())
    strange = sorted(name for name in stored.keys() - expected.keys() if not _is_embedding(name))
    if missing or strange:
        what = (
            f"lacks {_listed('weight', missing)}" if missing else f"has {_listed('weight', strange)} too many"
        )
        raise ModelError(
            f"connector 'hf_text': adapter {files.adapter!r} does not belong to model {files.source!r}: it "
            f"{what}; name the base model that it was trained on"
        )
    note = f"adapter {files.adapter} is applied to model {files.source}"
    trained_on = str(adapted.active_peft_config.base_model_name_or_path or files.source)
    if trained_on.rstrip("/").rpartition("/")[2] != files.source.rpartition("/")[2]:
        note += f"; it was trained on {trained_on}"
    return adapted.get_base_model(), note


def _is_embedding(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _listed(noun: str, names: Iterable[str]) -> str:
    """Return the count of names and the first few of them."""
    known = list(names)
    shown = ", ".join(known[:_NAMED]) + (", …" if len(known) > _NAMED else "")
    return f"{len(known)} {noun}{'' if len(known) == 1 else 's'} ({shown})"


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' reports: our own error message covers them."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _loading(files: TextFiles, what: str = "model") -> Iterator[None]:
    """Turn any error of a library while loading into a `ModelError` with one message."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        if "offload" in text:  # the rest of the model would go to the disk
            raise OutOfMemory(_short(text)) from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"connector 'hf_text': model {files.source!r} needs code of its own, which runs with your "
                f"rights; read it, and set {TRUST} to true to allow it"
            ) from error
        raise ModelError(
            f"connector 'hf_text' cannot load {what} {files.source!r}: {_short(text) or repr(error)}; "
            "connector_kwargs.model_id must name a causal language model that transformers can load: "
            "a hub id, or a directory with config.json, the weights (*.safetensors) and the tokenizer"
        ) from error


def _short(text: str) -> str:
    return textwrap.shorten(text, _LONGEST, placeholder=" …")
