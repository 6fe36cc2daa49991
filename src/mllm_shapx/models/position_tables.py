"""How many positions a loaded model has, where a table or a mask of fixed size bounds them."""

import re
from typing import Any

import torch

_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
_POSITIONS = re.compile(r"pos|wpe")
_OFFSET = 2
"""Rows that tables of OPT, BioGPT and BART hold before their first position."""


def position_limit(model: Any) -> int | None:
    """Return the most tokens that a model can read, None when nothing of fixed size bounds them.

    Found are tables of position embeddings, learned or sinusoidal, and MPT's ALiBi bias. Positions that are
    computed as they are needed (rotary embeddings as a rule) have no bound of this kind.
    """
    config = model.config.get_text_config()
    limit = next((value for key in _LIMITS if (value := getattr(config, key, None)) is not None), None)
    sizes = _table_sizes(model)
    if config.model_type == "mpt":  # its bias is cut from one that is as long as the config says
        sizes.append(config.max_seq_len)
    if not sizes:
        return None
    rows = min(sizes)
    usable = rows - _OFFSET if limit == rows - _OFFSET else rows
    return usable - 1 if config.model_type == "xlm" else usable  # it appends a mask token


def _table_sizes(model: Any) -> list[int]:
    words = model.get_input_embeddings()
    sizes: list[int] = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module is not words and _is_of_positions(name)
    ]
    # XGLM's table has another name; it grows.
    sizes += [
        tensor.shape[0]
        for name, tensor in model.named_buffers()
        if tensor.ndim > 1 and tensor.is_floating_point() and _is_of_positions(name)
    ]
    return sizes


def _is_of_positions(name: str) -> bool:
    return _POSITIONS.search(name.rpartition(".")[2]) is not None
