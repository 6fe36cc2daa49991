"""Measures LFM2-Audio coalitions per second: the package's own generator against ours, in one process.

    python benchmarks/bench_liquid.py --output text --json

Both answer the same coalitions of a spoken prompt, from rendered conversation to tokens, in turns, so that
other load on the machine affects both equally. Without `--model`, it uses a checkpoint of random weights.
"""

import argparse
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from mllm_shap import (
    AudioPart,
    CoalitionMask,
    ConversationSnapshot,
    DeletePolicy,
    Message,
    Role,
    TextPart,
    Turn,
)

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import AudioSegmentation, ConnectorKwargs
from mllm_shapx.explaining.audio_players import audio_player_set
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.liquid_audio import LiquidAudioModel, load
from mllm_shapx.planning.players import PlayerRule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from liquid_checkpoint import Dimensions, describe, write_random_checkpoint

RATE = 16_000
Steps = list[int | tuple[int, ...]]

SIZES = {
    "tiny": Dimensions(),
    "small": Dimensions(
        hidden=256,
        layer_types=("conv", "conv", "full_attention", "conv", "full_attention", "conv"),
        heads=8,
        key_value_heads=4,
        feed_forward=768,
        vocabulary=4096,
        encoder_dim=128,
        encoder_layers=4,
        encoder_channels=64,
        depth_layers=2,
    ),
    "lfm2-audio-1.5b": Dimensions(
        hidden=2048,
        layer_types=tuple(
            "full_attention" if index in {2, 5, 8, 10, 12, 14} else "conv" for index in range(16)
        ),
        heads=32,
        key_value_heads=8,
        feed_forward=8192,
        vocabulary=65_536,
        encoder_dim=512,
        encoder_layers=17,
        encoder_heads=8,
        encoder_channels=256,
        depth_layers=6,
        depth_dim=1024,
    ),
}
"""Checkpoints of random weights; the last has the dimensions of LFM2-Audio-1.5B."""


@dataclass(frozen=True)
class Rate:
    """Answered coalitions, and their time."""

    coalitions: int
    seconds: float

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.coalitions + other.coalitions, self.seconds + other.seconds)

    @property
    def per_second(self) -> float:
        """Return coalitions per second."""
        return self.coalitions / self.seconds


@dataclass
class Figures:
    """The measurements."""

    package: Rate
    ours: dict[int, Rate]
    """Batch size -> rate."""
    equal: int = 0
    compared: int = 0

    def compare(self, expected: Sequence[Steps], answers: Sequence[Steps]) -> None:
        """Count the answers of both, and the equal ones, token by token."""
        pairs = list(zip(expected, answers, strict=False))
        self.compared += len(pairs)
        self.equal += sum(left == right for left, right in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if the two differ in a token in float32."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    folder = options.model or write_random_checkpoint(
        Path(tempfile.mkdtemp(prefix="bench-liquid-")), SIZES[options.size], seed=4
    )
    decoding = Decoding(max_new_tokens=options.new_tokens, output_modality=options.output)
    coalitions = draw_coalitions(options.seconds, options.windows, max(options.batch_sizes), seed=0)
    kwargs = ConnectorKwargs(dtype=options.dtype)
    settings = ModelSettings("liquid_audio", str(folder), kwargs=kwargs, device=options.device)
    ours = load(settings, folder, None)
    package = Package(folder, ours, options.dtype, options.device)
    found = Figures(Rate(0, 0.0), dict.fromkeys(options.batch_sizes, Rate(0, 0.0)))
    time_of(lambda: package.answer(coalitions[:1], decoding), 1)
    for turn in range(options.rounds):
        few = coalitions[turn * options.own : (turn + 1) * options.own] or coalitions[: options.own]
        own_answers, took = time_of(partial(package.answer, few, decoding), len(few))
        found.package += took
        for size in options.batch_sizes:
            batch = (few + coalitions)[:size]
            answers, took = time_of(partial(answer, ours, batch, decoding), len(batch))
            found.ours[size] += took
            found.compare(own_answers, answers)
    report(options, folder, found)
    return int(options.dtype == "float32" and found.equal != found.compared)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measures LFM2-Audio coalitions per second.")
    parser.add_argument("--model", type=Path, default=None, help="checkpoint directory")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the random checkpoint")
    parser.add_argument("--output", choices=("text", "audio"), default="text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the recording")
    parser.add_argument("--windows", type=int, default=10, help="players in it")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--own", type=int, default=8, help="coalitions of the package's generator per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def draw_coalitions(seconds: float, windows: int, count: int, seed: int) -> list[ConversationSnapshot]:
    """Return random coalitions of one recording's windows, with a written question."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * RATE)) / RATE
    wave = 0.4 * np.sin(2 * np.pi * (300 + 700 * times) * times) + 0.05 * rng.standard_normal(len(times))
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="WAV")
    messages = (
        Message(role=Role.SYSTEM, content=(TextPart("You are a helpful assistant."),)),
        Message(role=Role.USER, content=(AudioPart(buffer.getvalue(), RATE),)),
    )
    snapshot = ConversationSnapshot.from_turns(tuple(Turn(messages=(each,)) for each in messages))
    segmentation = AudioSegmentation(window_ms=1000 * seconds / windows)
    players = audio_player_set(snapshot, segmentation, PlayerRule("none"))
    masks = (
        CoalitionMask(tuple(bool(bit) for bit in rng.random(players.num_players) < 0.5)) for _ in range(count)
    )
    return [DeletePolicy().apply(snapshot, players, mask) for mask in masks]


class Package:
    """The package's own generator with the same weights."""

    def __init__(self, folder: Path, ours: LiquidAudioModel, dtype: str, device: str) -> None:
        from liquid_audio import LFM2AudioProcessor

        # Our model has the package's model object; loading it twice would only cost memory.
        self._model = ours.network
        self._processor = LFM2AudioProcessor.from_pretrained(folder, device=device)
        self._dtype = getattr(torch, dtype)

    def answer(self, snapshots: Sequence[ConversationSnapshot], decoding: Decoding) -> list[Steps]:
        """Answer one after another."""
        return [self._answer(snapshot, decoding) for snapshot in snapshots]

    def _answer(self, snapshot: ConversationSnapshot, decoding: Decoding) -> Steps:
        interleaved = decoding.output_modality == "audio"
        generate = self._model.generate_interleaved if interleaved else self._model.generate_sequential
        steps = generate(**self._chat(snapshot), max_new_tokens=decoding.max_new_tokens)
        return [step.item() if step.numel() == 1 else tuple(step.tolist()) for step in steps]

    def _chat(self, snapshot: ConversationSnapshot) -> Any:
        from liquid_audio import ChatState

        state = ChatState(self._processor, codebooks=self._model.codebooks, dtype=self._dtype)
        for message in snapshot.messages():
            state.new_turn(message.role.value)
            for part in message.content:
                if isinstance(part, AudioPart):
                    samples, rate = soundfile.read(io.BytesIO(part.data()), dtype="float32")
                    if len(samples):
                        state.add_audio(torch.from_numpy(samples)[None], rate)
                elif part.text:
                    state.add_text(part.text)
            state.end_turn()
        state.new_turn("assistant")
        return state


def answer(
    ours: LiquidAudioModel, snapshots: Sequence[ConversationSnapshot], decoding: Decoding
) -> list[Steps]:
    """Answer as one batch, without state of earlier ones."""
    ours.forget_recordings()
    prompts = [ours.encode(snapshot, decoding) for snapshot in snapshots]
    return [generation.steps for generation in ours.generate(prompts, decoding, [0] * len(prompts))]


def time_of(work: Callable[[], list[Steps]], coalitions: int) -> tuple[list[Steps], Rate]:
    """Run `work`; return its answers and its rate."""
    began = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, Rate(coalitions, time.perf_counter() - began)


def report(options: argparse.Namespace, folder: Path, found: Figures) -> None:
    """Print the figures as a table or as one JSON object."""
    own = found.package.per_second
    rates = {size: rate.per_second for size, rate in found.ours.items()}
    top = max(rates, key=lambda size: rates[size])
    checkpoint = folder.name if options.model else {"size": options.size, **describe(SIZES[options.size])}
    figures = {
        "output": options.output,
        "device": options.device,
        "dtype": options.dtype,
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "new_tokens": options.new_tokens,
        "seconds_of_audio": options.seconds,
        "checkpoint": checkpoint,
        "package_per_second": round(own, 2),
        "ours_per_second": {str(size): round(rate, 2) for size, rate in rates.items()},
        "best_batch_size": top,
        "ratio": round(rates[top] / own, 2),
        "equal_answers": f"{found.equal} of {found.compared}",
    }
    if options.json:
        print(json.dumps(figures))
        return
    print(f"package, one at a time   {own:8.2f} coalitions/s")
    for size, rate in rates.items():
        print(f"ours, batch {size:4d}         {rate:8.2f} coalitions/s   {rate / own:6.1f} x")
    print(f"equal answers: {found.equal} of {found.compared}")


if __name__ == "__main__":
    sys.exit(main())
