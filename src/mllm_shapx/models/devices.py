"""Chooses device and dtype of a model, and recognizes errors of full memory."""

import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ResourceError
from mllm_shapx.models.base import ModelIdentity, OutOfMemory

_CGROUP = Path("/sys/fs/cgroup")
_WEIGHTS_SHARE = 0.85
"""Largest share of each GPU's free memory for the weights of a spread model; prompts use the rest."""
_FULL = ("can't allocate memory", "not enough memory", "out of memory")


def pick_device(asked: str | None) -> torch.device:
    """Return the device `asked`; for None, the first available of CUDA, Apple MPS and CPU.

    Raises:
        ResourceError: When the machine lacks the device.
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


@dataclass(frozen=True, slots=True)
class Placement:
    """The device or devices for a model's weights."""

    device: torch.device
    """Device of prompts and logits."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained`: a device map and, for several devices, their memory."""

    def check(self, model: Any) -> None:
        """Refuse a model that lies partly in main memory because the GPUs are too small.

        Raises:
            OutOfMemory: With the number of devices.
        """
        if self.device.type == "cuda" and {"cpu", "disk"} & set(devices_of(model)):
            raise OutOfMemory(f"its weights are larger than the free memory of {self.names}")

    def notes(self, model: Any) -> tuple[str, ...]:
        """Return notes for the user: the devices over which the model is spread."""
        found = devices_of(model)
        return (
            (f"the model is spread over {len(found)} devices: {', '.join(found)}",) if len(found) > 1 else ()
        )

    @property
    def names(self) -> str:
        """Return the devices in words."""
        memory = self.options.get("max_memory")
        return (
            str(self.device) if memory is None else ", ".join(f"cuda:{key}" for key in memory if key != "cpu")
        )


def place_model(asked: str | None) -> Placement:
    """Return the placement of a model: one device, or all GPUs of this process.

    Ray gives a worker its GPUs in CUDA_VISIBLE_DEVICES. If it lists several and `asked` has no device number,
    the model is spread over them, layer by layer. Without the variable, other processes may use the GPUs, and
    the model goes to the first.

    Raises:
        ResourceError: When the machine lacks the device.
    """
    device = pick_device(asked)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count == 1 or device.index is not None or not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return Placement(device, {"device_map": str(device)})
    free = [torch.cuda.mem_get_info(index)[0] for index in range(count)]
    memory = {index: int(_WEIGHTS_SHARE * each) for index, each in enumerate(free)}
    # The CPU gets no memory: every pass would fetch weights in main memory again.
    return Placement(torch.device("cuda:0"), {"device_map": "auto", "max_memory": {**memory, "cpu": 0}})


def devices_of(model: Any) -> list[str]:
    """Return the devices of a model's weights (`disk` included), in the order of its layers."""
    spread = getattr(model, "hf_device_map", None) or {"": model.device}
    names = (f"cuda:{place}" if isinstance(place, int) else str(place) for place in spread.values())
    return list(dict.fromkeys(names))


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the dtype `asked`.

    `auto` is bfloat16 on accelerators that support it, float16 on others, float32 on the CPU. Many models
    trained in bfloat16 overflow in float16 (mllm_shap has the same order).
    """
    if asked != "auto":
        found: torch.dtype = getattr(torch, asked)
        return found
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _mps_has_bfloat16()
    return torch.bfloat16 if has_bfloat16 else torch.float16


def loaded_identity(
    settings: ModelSettings, revision: str | None, dtype: torch.dtype, device: torch.device
) -> ModelIdentity:
    """Return the identity of the model of a run, loaded with `dtype` on `device`."""
    name = str(dtype).removeprefix("torch.")
    return ModelIdentity(settings.connector, settings.model_id, revision, name, str(device))


def _mps_has_bfloat16() -> bool:
    try:
        torch.ones(1, dtype=torch.bfloat16, device="mps")
    except (RuntimeError, TypeError):
        return False
    return True


def free_memory() -> int:
    """Return the free bytes of main memory: of the machine, or of its control group if less."""
    import psutil

    free: int = psutil.virtual_memory().available
    try:
        most, taken = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(taken))


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn the device's errors of full memory into `OutOfMemory`, and free cached memory."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        full: Exception = error
    except RuntimeError as error:  # CPU and MPS have no error class for full memory
        if not any(words in str(error) for words in _FULL):
            raise
        full = error
    else:
        return
    traceback.clear_frames(full.__traceback__)  # they hold the tensors of the failed pass
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemory(str(full)) from None


def own_memory(network: Any) -> None:
    """Copy weights in main memory, so that they do not depend on their file.

    safetensors maps files into memory: writing to the file would change the loaded weights.
    Weights on other devices are copies already. `network` is a `torch.nn.Module`.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
