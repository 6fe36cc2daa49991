"""Memory: weights in memory of their own, and how full the GPUs are."""

import sys
from typing import Any


def own_memory(network: Any) -> None:
    """Copy the weights that lie in the main memory, so that a file that is written to does not change them.

    safetensors maps a file into memory.
    Weights on other devices are copies already. `network` is a `torch.nn.Module`.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def gpu_memory() -> tuple[int, int] | None:
    """Return the bytes in use and in all of this process's GPUs; None where it uses none."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    pairs = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    total = sum(size for _, size in pairs)
    return total - sum(free for free, _ in pairs), total
