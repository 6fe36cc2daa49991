"""Decodes audio frames to waveforms, with the decoder of an LFM2-Audio checkpoint if it has one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mllm_shapx.models.liquid_checkpoint import LiquidCheckpoint, repaired_block

OUTPUT_RATE = 24_000
"""Rate in hertz of generated speech."""


class FrameDecoder:
    """Turns generated frames into waveforms; built at the first use."""

    def __init__(self, checkpoint: LiquidCheckpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._decoder: Any = None

    @property
    def kind(self) -> str | None:
        """Return `detokenizer` or `mimi`, or None when the checkpoint has no decoder."""
        if self._checkpoint.processor.detokenizer_path is not None:
            return "detokenizer"
        return "mimi" if self._checkpoint.processor.mimi_weights_path is not None else None

    def waveform(self, frames: Sequence[tuple[int, ...]]) -> NDArray[np.float32] | None:
        """Return the mono waveform of `frames` at `OUTPUT_RATE`, None without a decoder or frames."""
        if not frames or self.kind is None:
            return None
        codes = torch.tensor(frames, device=self._device).mT[None]
        with torch.inference_mode():
            wave = self._detokenizer()(codes) if self.kind == "detokenizer" else self._mimi().decode(codes)
        samples: NDArray[np.float32] = wave.reshape(-1).float().cpu().numpy()
        return samples

    def _mimi(self) -> Any:
        """Build the Mimi codec on our device."""
        if self._decoder is None:
            from liquid_audio.moshi.models.loaders import get_mimi
            from safetensors.torch import load_file

            mimi = get_mimi(None, device=self._device)
            mimi.load_state_dict(load_file(self._checkpoint.processor.mimi_weights_path))
            self._decoder = mimi.eval()
        return self._decoder

    def _detokenizer(self) -> Any:
        """Build the package's detokenizer on our device; the package itself puts it on CUDA only."""
        if self._decoder is None:
            from liquid_audio import LFM2AudioDetokenizer
            from safetensors.torch import load_file
            from transformers import Lfm2Config

            folder = Path(self._checkpoint.processor.detokenizer_path)
            config = Lfm2Config(**_detokenizer_config(folder))
            detokenizer = LFM2AudioDetokenizer(config).eval()
            detokenizer.load_state_dict(load_file(folder / "model.safetensors"))
            self._decoder = detokenizer.to(self._device)
        return self._decoder


def _detokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the detokenizer's config for transformers, without sliding layers: a mask holds their window."""
    import json

    from transformers import Lfm2Config

    config = repaired_block(json.loads((folder / "config.json").read_text()), Lfm2Config)
    layers = config.get("layer_types")
    if layers:
        renamed = ["full_attention" if layer == "sliding_attention" else layer for layer in layers]
        config["layer_types"] = renamed
    return config
