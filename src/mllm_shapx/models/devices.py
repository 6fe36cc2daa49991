"""Which device and dtype a model is loaded with, and what running out of memory looks like."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mllm_shapx.errors import ResourceError
from mllm_shapx.models.base import OutOfMemory

_CGROUP = Path("/sys/fs/cgroup")
_FULL = ("can't allocate memory", "not enough memory", "out of memory")


def pick_device(asked: str | None) -> torch.device:
    """Return the device asked for; CUDA, then Apple MPS, then the CPU when None.

    Raises:
        ResourceError: When the device asked for is not on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(asked)
    if device.type == "cuda" and not (cuda and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if cuda else 0
        raise ResourceError(
            f"device {asked!r} is not on this machine: PyTorch sees {count} CUDA device(s); "
            "leave `device` out to take the best there is, or set it to 'cpu'"
        )
    if device.type == "mps" and not mps:
        raise ResourceError(f"device {asked!r} is not on this machine; leave `device` out or set it to 'cpu'")
    return device


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the dtype asked for.

    `auto` is bfloat16 on accelerators that have it, float16 on others, float32 on the CPU: float16 overflows
    on many models trained in bfloat16 (mllm_shap has the same order).
    """
    if asked != "auto":
        found: torch.dtype = getattr(torch, asked)
        return found
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _mps_has_bfloat16()
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _mps_has_bfloat16() -> bool:
    try:
        torch.ones(1, dtype=torch.bfloat16, device="mps")
    except (RuntimeError, TypeError):
        return False
    return True


def free_memory() -> int:
    """Return the bytes of main memory still free: the machine's, or its control group's if less."""
    import psutil

    free: int = psutil.virtual_memory().available
    try:
        most, taken = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(taken))


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn what the device raises when memory is full into `OutOfMemory`, and give cached memory back."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        full: Exception = error
    except RuntimeError as error:  # the CPU's and MPS's allocators have no class of their own
        if not any(words in str(error) for words in _FULL):
            raise
        full = error
    else:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemory(str(full)) from None
