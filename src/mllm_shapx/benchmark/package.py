"""The liquid_audio package's own generator, one chat at a time: what LFM2-Audio is compared with."""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_shap import ConversationSnapshot, Message, TextPart

from mllm_shapx.models.base import Decoding, ModelIdentity
from mllm_shapx.models.liquid_chat import MIN_SAMPLES, SAMPLE_RATE
from mllm_shapx.models.liquid_checkpoint import load_checkpoint


class PackageGenerate:
    """Answers chats with the package's `generate_sequential` or `generate_interleaved`.

    Args:
        folder: The checkpoint; it is loaded a second time.
        identity: Dtype and device of the model that we answer with.
        decoding: How answers are decoded.
    """

    def __init__(self, folder: Path, identity: ModelIdentity, decoding: Decoding) -> None:
        import torch

        self._dtype = getattr(torch, identity.dtype)
        self._device = torch.device(identity.device)
        self._checkpoint = load_checkpoint(
            folder, dtype=self._dtype, device=self._device, attn_implementation="sdpa"
        )
        self._decoding = decoding

    def seconds_for(self, snapshots: Sequence[ConversationSnapshot]) -> float:
        """Return the seconds that it takes to answer all, one after the other."""
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            for snapshot in snapshots:
                self._answer(snapshot)
        return time.perf_counter() - started

    def _answer(self, snapshot: ConversationSnapshot) -> None:
        model, decoding = self._checkpoint.model, self._decoding
        spoken = decoding.output_modality == "audio"
        generate = model.generate_interleaved if spoken else model.generate_sequential
        for step in generate(
            **self._chat(snapshot),
            max_new_tokens=decoding.max_new_tokens,
            text_temperature=decoding.text_temperature or None,
            text_top_k=decoding.text_top_k,
            audio_temperature=decoding.audio_temperature,
            audio_top_k=decoding.audio_top_k,
        ):
            step.tolist()  # an accelerator answers before it is done

    def _chat(self, snapshot: ConversationSnapshot) -> Any:
        from liquid_audio import ChatState

        state = ChatState(
            self._checkpoint.processor, codebooks=self._checkpoint.model.codebooks, dtype=self._dtype
        )
        for message in snapshot.messages():
            state.new_turn(message.role.value)
            _add_content(state, message)
            state.end_turn()
        state.new_turn("assistant")
        if self._decoding.assistant_prefill:
            state.add_text(self._decoding.assistant_prefill)
        return {name: value.to(self._device) for name, value in state.items()}


def _add_content(state: Any, message: Message) -> None:
    import soundfile
    import torch

    for part in message.content:
        if isinstance(part, TextPart):
            if part.text:
                state.add_text(part.text)
            continue
        samples, rate = soundfile.read(io.BytesIO(part.data()), dtype="float32", always_2d=True)
        if len(samples):
            wave = torch.from_numpy(samples.mean(axis=1))[None]
            shortest = -(-MIN_SAMPLES * rate // SAMPLE_RATE)
            state.add_audio(torch.nn.functional.pad(wave, (0, max(0, shortest - wave.shape[1]))), rate)
