"""Rotary positions that change with the longest position that a model sees.

`dynamic` NTK scaling and `longrope` compute other frequencies once a batch goes beyond the length that the
model was trained with. A prompt would then get another answer beside a longer one than alone. `dynamic` also
remembers the longest position of earlier calls, so that an answer would depend on what was asked before.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

_STATE = ("inv_freq", "max_seq_len_cached", "attention_scaling")


class ChangingPositions:
    """The modules of a model whose rotary frequencies change with the length, and their state when new.

    Args:
        model: The loaded model, before it has answered anything.
    """

    def __init__(self, model: Any) -> None:
        modules = [module for module in model.modules() if _changes(module)]
        self._new = [(module, _state(module)) for module in modules]
        self.bound: int | None = min((_trained_length(module) for module in modules), default=None)
        """Positions up to which nothing changes; None when nothing ever does."""

    def smallest_bound(self, other: int | None) -> int | None:
        """Return the smaller of `bound` and another bound; None stands for no bound."""
        return min((each for each in (self.bound, other) if each is not None), default=None)

    @contextlib.contextmanager
    def reset(self) -> Iterator[None]:
        """Give the model the frequencies that it was loaded with, before a batch and after it."""
        self._put_back()
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for module, state in self._new:
            for name, value in state.items():
                if name in module._buffers:  # noqa: SLF001 -- buffers that must not be saved with the model
                    module.register_buffer(name, value.clone(), persistent=False)
                else:
                    setattr(module, name, value)


def _changes(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    found = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in found)


def _state(module: Any) -> dict[str, Any]:
    names = {*vars(module), *module._buffers}  # noqa: SLF001 -- their names are looked through
    found = {name: getattr(module, name) for name in names if name.endswith(_STATE)}
    return {name: value.clone() if hasattr(value, "clone") else value for name, value in found.items()}


def _trained_length(module: Any) -> int:
    """Return the positions up to which the module uses the frequencies that it was made with."""
    blocks = getattr(module.config, "rope_parameters", None) or {}
    nested = [block for block in (blocks, *blocks.values()) if isinstance(block, dict)]
    lengths = [block.get("original_max_position_embeddings") for block in nested]
    lengths += [getattr(module, "original_max_seq_len", None)]
    return min((int(length) for length in lengths if length), default=1)
