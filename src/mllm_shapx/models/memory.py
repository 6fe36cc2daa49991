"""Weights in memory of their own: safetensors maps a file into memory, and who writes to it changes them."""

from typing import Any


def own_memory(network: Any) -> None:
    """Copy the weights that lie in the main memory, so that a file that is written to does not change them.

    Weights on other devices are copies already. `network` is a `torch.nn.Module`.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
