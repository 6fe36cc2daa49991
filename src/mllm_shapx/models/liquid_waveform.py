"""Decodes audio frames to waveforms, with the decoder of an LFM2-Audio checkpoint if it has one."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mllm_shapx.models.liquid_checkpoint import repaired_block

OUTPUT_RATE = 24_000
"""Rate in hertz of generated speech."""


class FrameDecoder:
    """Turns generated frames into waveforms. It is built at the first use, on the model's device.

    Args:
        processor: `liquid_audio.LFM2AudioProcessor`, which says what decoder the checkpoint has.
        device: The model's device; the package itself uses CUDA only.
    """

    def __init__(self, processor: Any, device: torch.device) -> None:
        self._processor = processor
        self._device = device

    def waveform(self, frames: Sequence[tuple[int, ...]]) -> NDArray[np.float32] | None:
        """Return the mono waveform of `frames` at `OUTPUT_RATE`, None without a decoder or frames."""
        if not frames or self._decode is None:
            return None
        with torch.inference_mode():
            wave = self._decode(torch.tensor(frames, device=self._device).mT[None])
        samples: NDArray[np.float32] = wave.reshape(-1).float().cpu().numpy()
        return samples

    @cached_property
    def _decode(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Turn codes, shaped (1, codebooks, frames), into sound; None when the checkpoint has no decoder."""
        from safetensors.torch import load_file

        if self._processor.detokenizer_path is not None:
            from liquid_audio import LFM2AudioDetokenizer
            from transformers import Lfm2Config

            folder = Path(self._processor.detokenizer_path)
            detokenizer = LFM2AudioDetokenizer(Lfm2Config(**_detokenizer_config(folder))).eval()
            detokenizer.load_state_dict(load_file(folder / "model.safetensors"))
            return detokenizer.to(self._device)  # type: ignore[no-any-return]
        if self._processor.mimi_weights_path is not None:
            from liquid_audio.moshi.models.loaders import get_mimi

            mimi = get_mimi(None, device=self._device)
            mimi.load_state_dict(load_file(self._processor.mimi_weights_path))
            return mimi.eval().decode  # type: ignore[no-any-return]
        return None


def _detokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the detokenizer's config for transformers, without sliding layers: a mask holds their window."""
    from transformers import Lfm2Config

    config = repaired_block(json.loads((folder / "config.json").read_text()), Lfm2Config)
    layers = config.get("layer_types")
    if layers:
        renamed = ["full_attention" if layer == "sliding_attention" else layer for layer in layers]
        config["layer_types"] = renamed
    return config
