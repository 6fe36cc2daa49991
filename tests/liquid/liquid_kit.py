"""Small random checkpoints, random chats, and the package's own generator as the reference."""

import io
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import soundfile
import torch
from liquid_checkpoint import Dimensions, write_random_checkpoint
from mllm_shap import AudioPart, ConversationSnapshot, Message, Role, TextPart, Turn

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import ConnectorKwargs
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.liquid_audio import LiquidAudioModel, load

WORDS = ("tell", "me", "what", "you", "hear", "in", "this", "recording", "please", "now", "Źdźbło", "hm?")
TINY = Dimensions(
    layer_types=("conv", "full_attention", "conv"), encoder_layers=1, interleaved_text=3, interleaved_audio=4
)


@cache
def checkpoint() -> Path:
    """Return a checkpoint of random weights, written once per test session."""
    return write_random_checkpoint(Path(mkdtemp(prefix="liquid-")), TINY, seed=4)


@cache
def model() -> LiquidAudioModel:
    return load_liquid(checkpoint())


def load_liquid(
    folder: Path, *, device: str = "cpu", name: str | None = None, revision: str | None = None, **kwargs: Any
) -> LiquidAudioModel:
    """Load a directory as `liquid_audio` does, in float32 unless `kwargs` say otherwise."""
    options = ConnectorKwargs(**{"dtype": "float32", **kwargs})
    settings = ModelSettings("liquid_audio", name or str(folder), kwargs=options, device=device)
    return load(settings, folder, revision)


@cache
def package() -> tuple[Any, Any]:
    """Return the package's own (model, processor), loaded by its own functions."""
    from liquid_audio import LFM2AudioModel, LFM2AudioProcessor

    own = LFM2AudioModel.from_pretrained(checkpoint(), dtype=torch.float32, device="cpu").eval()
    return own, LFM2AudioProcessor.from_pretrained(checkpoint(), device="cpu")


def wav(samples: Any, rate: int = 16_000, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(samples, dtype=np.float32), rate, format="WAV", **options)
    return buffer.getvalue()


def sound(rng: np.random.Generator, seconds: float, rate: int = 16_000) -> np.ndarray:
    """Return a chirp with noise, in [-1, 1]."""
    t = np.arange(round(seconds * rate)) / rate
    low, high = rng.uniform(150, 900), rng.uniform(900, 3000)
    sweep = np.sin(2 * np.pi * (low + (high - low) * t / max(seconds, 1e-3)) * t)
    return np.clip(0.4 * sweep + 0.1 * rng.standard_normal(len(t)), -1, 1)


def chat(*messages: Message) -> ConversationSnapshot:
    return ConversationSnapshot.from_turns(tuple(Turn(messages=(message,)) for message in messages))


def spoken(data: bytes, rate: int = 16_000, role: Role = Role.USER) -> Message:
    return Message(role=role, content=(AudioPart(data, rate),))


def written(text: str, role: Role = Role.USER) -> Message:
    return Message(role=role, content=(TextPart(text),))


def random_chat(seed: int) -> ConversationSnapshot:
    """Return a system prompt and one to three messages, spoken or written, of any length."""
    rng = np.random.default_rng(seed)
    messages = [written("You are a helpful assistant.", Role.SYSTEM)]
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.6:
            rate = int(rng.choice([8_000, 16_000, 22_050, 44_100]))
            messages.append(spoken(wav(sound(rng, rng.uniform(0.05, 2.0), rate), rate), rate))
        else:
            messages.append(written(" ".join(rng.choice(WORDS, rng.integers(0, 9)))))
    return chat(*messages)


def package_chat(snapshot: ConversationSnapshot) -> Any:
    """Return the package's `ChatState` of a snapshot."""
    from liquid_audio import ChatState

    own, processor = package()
    state = ChatState(processor, codebooks=own.codebooks, dtype=torch.float32)
    for message in snapshot.messages():
        state.new_turn(message.role.value)
        for part in message.content:
            if isinstance(part, TextPart):
                if part.text:
                    state.add_text(part.text)
            else:
                samples, rate = soundfile.read(io.BytesIO(part.data()), dtype="float32", always_2d=True)
                state.add_audio(torch.from_numpy(samples.mean(axis=1))[None], rate)
        state.end_turn()
    state.new_turn("assistant")
    return state


def package_answer(snapshot: ConversationSnapshot, decoding: Decoding) -> list[int | tuple[int, ...]]:
    """Return what the package generates for one chat: tokens and frames in order."""
    own, _ = package()
    interleaved = decoding.output_modality == "audio"
    generate = own.generate_interleaved if interleaved else own.generate_sequential
    steps = generate(
        **package_chat(snapshot),
        max_new_tokens=decoding.max_new_tokens,
        text_temperature=decoding.text_temperature,
        text_top_k=decoding.text_top_k,
        audio_temperature=decoding.audio_temperature,
        audio_top_k=decoding.audio_top_k,
    )
    return [step.item() if step.numel() == 1 else tuple(step.tolist()) for step in steps]


def our_answers(
    snapshots: list[ConversationSnapshot], decoding: Decoding, batch_size: int, seeds: list[int] | None = None
) -> list[list[int | tuple[int, ...]]]:
    """Return what our model generates, `batch_size` chats at a time."""
    ours = model()
    seeds = seeds or [0] * len(snapshots)
    found: list[list[int | tuple[int, ...]]] = []
    for start in range(0, len(snapshots), batch_size):
        part = slice(start, start + batch_size)
        prompts = [ours.encode(snapshot, decoding) for snapshot in snapshots[part]]
        found += [generation.steps for generation in ours.generate(prompts, decoding, seeds[part])]
    return found
