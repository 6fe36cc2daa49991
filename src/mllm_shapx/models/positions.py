"""Limits of a model's positions: fixed-size tables, and rotary frequencies that change with length.

`dynamic` NTK scaling and `longrope` change the frequencies when a batch exceeds the trained length. The
answer to a prompt would then depend on longer prompts of its batch. `dynamic` also remembers the longest
position of earlier calls, so an answer would depend on earlier prompts.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
_POSITIONS = re.compile(r"pos|wpe")
_OFFSET = 2
"""Rows before the first position in the tables of OPT, BioGPT and BART."""
_STATE = ("inv_freq", "max_seq_len_cached", "attention_scaling")


def position_limit(model: Any) -> int | None:
    """Return the most tokens that a model can read; None without a fixed limit.

    Limits come from tables of position embeddings, learned or sinusoidal, and from MPT's ALiBi bias.
    Positions computed on demand (usually rotary embeddings) have no such limit.
    """
    config = model.config.get_text_config()
    limit = next((value for key in _LIMITS if (value := getattr(config, key, None)) is not None), None)
    sizes = _table_sizes(model)
    if config.model_type == "mpt":  # its bias is a slice of one with the config's length
        sizes.append(config.max_seq_len)
    if not sizes:
        return None
    rows = min(sizes)
    usable = rows - _OFFSET if limit == rows - _OFFSET else rows
    return usable - 1 if config.model_type == "xlm" else usable  # appends a mask token


def _table_sizes(model: Any) -> list[int]:
    words = model.get_input_embeddings()
    sizes: list[int] = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module is not words and _is_of_positions(name)
    ]
    # XGLM's table has another name, and grows.
    sizes += [
        tensor.shape[0]
        for name, tensor in model.named_buffers()
        if tensor.ndim > 1 and tensor.is_floating_point() and _is_of_positions(name)
    ]
    return sizes


def _is_of_positions(name: str) -> bool:
    return _POSITIONS.search(name.rpartition(".")[2]) is not None


class ChangingPositions:
    """The modules whose rotary frequencies change with the length, and their initial state.

    Args:
        model: The loaded model, before its first answer.
    """

    def __init__(self, model: Any) -> None:
        modules = [module for module in model.modules() if _changes(module)]
        self._new = [(module, _state(module)) for module in modules]
        self.bound: int | None = min((_trained_length(module) for module in modules), default=None)
        """Positions up to which the frequencies stay the same; None when they always do."""

    def smallest_bound(self, other: int | None) -> int | None:
        """Return the smaller of `bound` and `other`; None means no bound."""
        return min((each for each in (self.bound, other) if each is not None), default=None)

    @contextlib.contextmanager
    def reset(self) -> Iterator[None]:
        """Restore the initial frequencies before and after a batch."""
        self._put_back()
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for module, state in self._new:
            for name, value in state.items():
                if name in module._buffers:  # noqa: SLF001 -- non-persistent buffers
                    module.register_buffer(name, value.clone(), persistent=False)
                else:
                    setattr(module, name, value)


def _changes(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    found = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in found)


def _state(module: Any) -> dict[str, Any]:
    names = {*vars(module), *module._buffers}  # noqa: SLF001 -- only their names are read
    found = {name: getattr(module, name) for name in names if name.endswith(_STATE)}
    return {name: value.clone() if hasattr(value, "clone") else value for name, value in found.items()}


def _trained_length(module: Any) -> int:
    """Return the positions up to which the module uses its initial frequencies."""
    blocks = getattr(module.config, "rope_parameters", None) or {}
    nested = [block for block in (blocks, *blocks.values()) if isinstance(block, dict)]
    lengths = [block.get("original_max_position_embeddings") for block in nested]
    lengths += [getattr(module, "original_max_seq_len", None)]
    return min((int(length) for length in lengths if length), default=1)
