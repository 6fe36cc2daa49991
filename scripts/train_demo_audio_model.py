"""Trains the audio demo's small LFM2-Audio checkpoint from random weights, and writes its rows.

    python scripts/train_demo_audio_model.py --out-model demo_audio/model --out-rows demo_audio/rows.parquet

The model learns `demo_audio_task`'s answers from recordings with random stretches cut out, as in the
coalitions of an explanation. Everything is seeded: on one machine, with one number of threads, two runs write
the same weights. Only the text output is trained: audio answers are noise.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_audio_task import (
    NEUTRAL,
    QUESTION,
    RATE,
    SENTENCES,
    STRETCH_MS,
    SYSTEM_PROMPT,
    Recording,
    demo_recordings,
    draw_coalition,
    draw_recording,
)
from liquid_checkpoint import (
    Dimensions,
    build_model,
    build_tokenizer,
    checkpoint_config,
    write_checkpoint,
)

SIZE = Dimensions(
    hidden=64,
    layer_types=("conv", "full_attention", "conv", "full_attention"),
    feed_forward=160,
    vocabulary=512,
    codebooks=2,
    encoder_dim=64,
    encoder_layers=1,
    encoder_channels=16,
    encoder_norm="layer_norm",
    dropout=0.0,
)


@dataclass(frozen=True)
class Settings:
    """Settings of the training."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float = 3e-3
    question_share: float = 0.2
    """Share of the chats that have words of a written question besides the recording."""
    growing_share: float = 0.6
    """Share of the training in which recordings grow from one stretch to all."""


@dataclass(frozen=True)
class Example:
    """A chat: its recording, a written question (may be empty) and the right answer."""

    recording: Recording
    question: str
    question_first: bool

    @property
    def answer(self) -> str:
        """Return the right answer."""
        return self.recording.answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save and check; return 1 if too many answers are wrong."""
    import torch

    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(mode=True)
    settings = Settings(seed=options.seed, steps=options.steps, batch_size=options.batch_size)
    rows = demo_recordings(settings.seed + 1000, options.rows)
    write_rows(rows, options.out_rows)
    config = checkpoint_config(SIZE)
    model = build_model(config, settings.seed)
    spread(model, settings.seed)
    tokenizer = build_tokenizer(vocabulary_words(), SIZE.vocabulary)
    trainer = Trainer(model, tokenizer, config, settings)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    trainer.train()
    write_checkpoint(options.out_model, config, model, tokenizer, torch.bfloat16)
    print(f"model -> {options.out_model}, {len(rows)} rows -> {options.out_rows}", flush=True)
    return check(options.out_model, rows, settings, options.min_accuracy)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Trains the audio demo's model and writes its rows.")
    parser.add_argument("--out-model", type=Path, default=Path("demo_audio/model"))
    parser.add_argument("--out-rows", type=Path, default=Path("demo_audio/rows.parquet"))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--rows", type=int, default=21)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32, help="chats per training step")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; part of what decides the weights"
    )
    parser.add_argument(
        "--min-accuracy", type=float, default=0.95, help="share of right answers below which the script fails"
    )
    return parser.parse_args(arguments)


def write_rows(rows: Sequence[Recording], path: Path) -> None:
    """Write the demo's rows as parquet, with the planted interval of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    planted = [row.planted_index or 0 for row in rows]
    table = pa.table(
        {
            "audio": [{"bytes": row.wav(), "path": f"row_{index}.wav"} for index, row in enumerate(rows)],
            "language": ["en"] * len(rows),
            "stretches": [" ".join(row.names) for row in rows],
            "planted_sound": [row.names[index] for row, index in zip(rows, planted, strict=True)],
            "planted_index": planted,
            "planted_start_ms": [index * STRETCH_MS for index in planted],
            "planted_end_ms": [(index + 1) * STRETCH_MS for index in planted],
        }
    )
    pq.write_table(table, path, compression="zstd")


def vocabulary_words() -> list[str]:
    """Return the words that get their own token."""
    return " ".join([SYSTEM_PROMPT, QUESTION, NEUTRAL, *SENTENCES.values(), "system user assistant"]).split()


def spread(model: Any, seed: int) -> None:
    """Draw the backbone's weights by their fan-in: the library's are too small for so small a model."""
    import torch

    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.lfm.parameters():
            if weight.ndim > 1:
                fan_in = weight.shape[-1] if weight.ndim == 2 else weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=draws) / fan_in**0.5)


def draw_part(rng: np.random.Generator, recording: Recording, longest: int) -> Recording:
    """Return a random part of `recording`: at most `longest` stretches, more often with the planted one."""
    count = len(recording.names)
    share = 1.0 if rng.random() < 0.2 else rng.random()
    kept = np.flatnonzero(rng.random(count) < share)
    if len(kept) > longest:
        kept = rng.choice(kept, longest, replace=False)
        if rng.random() < 0.5:
            kept[0] = recording.planted_index or 0
    return recording.only([index in kept for index in range(count)])


class Trainer:
    """Trains the package's own model, through its own encoder, adapter and backbone."""

    def __init__(self, model: Any, tokenizer: Any, config: dict[str, Any], settings: Settings) -> None:
        from liquid_audio.model.conformer.processor import AudioToMelSpectrogramPreprocessor

        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._features = AudioToMelSpectrogramPreprocessor(**config["preprocessor"]).eval()
        self._rng = np.random.default_rng(settings.seed)

    def train(self) -> None:
        """Run all steps; the loss counts the answers' tokens only."""
        import torch

        settings, model = self._settings, self._model
        trained = [
            weight
            for name, weight in model.named_parameters()
            if name.startswith(("lfm.", "conformer.", "audio_adapter."))
        ]
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
        )
        model.train()
        began = time.monotonic()
        for step in range(1, settings.steps + 1):
            progress = step / settings.steps
            loss, right = self._loss([self._draw(progress) for _ in range(settings.batch_size)])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == settings.steps:
                seconds = time.monotonic() - began
                print(f"{step}/{settings.steps}  loss {loss.item():.4f}  right {right:.3f}  {seconds:.0f} s")
        model.eval()

    def _draw(self, progress: float) -> Example:
        """Draw a chat. Recordings grow from one stretch to all with `progress`, in [0, 1]."""
        rng = self._rng
        recording = draw_recording(rng)
        longest = 1 + round(len(recording.names) * min(1.0, progress / self._settings.growing_share))
        question = ""
        if rng.random() < self._settings.question_share:
            question = " ".join(word for word in QUESTION.split() if rng.random() < 0.7)
        part = draw_part(rng, recording, longest)
        return Example(part, question, question_first=bool(rng.random() < 0.5))

    def _loss(self, examples: Sequence[Example]) -> tuple[Any, float]:
        import torch

        spoken = self._encode([example.recording for example in examples])
        inputs, labels = zip(
            *(self._teach(example, audio) for example, audio in zip(examples, spoken, strict=True)),
            strict=True,
        )
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
        states = self._model.lfm(inputs_embeds=padded, use_cache=False).last_hidden_state[:, :-1]
        chosen = wanted != -100
        logits = states[chosen] @ self._model.lfm.embed_tokens.weight.T
        # The first word decides the sentence: its weight equals that of all others.
        first = torch.cat([torch.tensor([[False]]).expand(len(examples), 1), chosen[:, :-1]], dim=1)
        first = (chosen & ~first)[chosen]
        losses = torch.nn.functional.cross_entropy(logits, wanted[chosen], reduction="none")
        right = (logits.argmax(-1) == wanted[chosen])[first].float().mean().item()
        return losses[first].mean() + losses[~first].mean(), right

    def _encode(self, recordings: Sequence[Recording]) -> list[Any]:
        """Return the adapted encoder output of each recording, None for an empty one."""
        import torch

        features = []
        for recording in recordings:
            if recording.stretches:
                wave = torch.tensor(np.concatenate(recording.stretches), dtype=torch.float32)[None]
                features.append(self._features(wave, torch.tensor([wave.shape[1]]))[0][0].mT)
        lengths = torch.tensor([len(each) for each in features])
        padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        output, sizes = self._model.conformer(padded.mT, lengths)
        outputs = iter(
            self._model.audio_adapter(output[index].mT[:size]) for index, size in enumerate(sizes.tolist())
        )
        return [next(outputs) if recording.stretches else None for recording in recordings]

    def _teach(self, example: Example, audio: Any) -> tuple[Any, Any]:
        """Return inputs, (positions, hidden), and labels, (positions,), of one chat and its answer."""
        import torch

        table = self._model.lfm.embed_tokens
        parts: list[Any] = []
        labels: list[int] = []

        def add_text(text: str, taught: bool = False) -> None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if ids:
                parts.append(table(torch.tensor(ids)))
                labels.extend(ids if taught else [-100] * len(ids))

        def add_message(role: str, text: str, sound: Any = None) -> None:
            add_text(f"<|im_start|>{role}\n")
            add_text(text)
            if sound is not None:
                parts.append(sound)
                labels.extend([-100] * len(sound))
            add_text("<|im_end|>\n")

        add_text("<|startoftext|>")
        add_message("system", SYSTEM_PROMPT)
        if example.question and example.question_first:
            add_message("user", example.question)
        add_message("user", "", audio)
        if example.question and not example.question_first:
            add_message("user", example.question)
        add_text("<|im_start|>assistant\n")
        add_text(example.answer, taught=True)
        add_text("<|im_end|>", taught=True)
        return torch.cat(parts), torch.tensor(labels)


def answers(folder: Path, recordings: Sequence[Recording], batch_size: int = 64) -> list[str]:
    """Return the saved model's greedy answers from the product."""
    from mllm_shap import AudioPart, ConversationSnapshot, Message, Role, Turn

    from mllm_shapx.config.model_settings import ModelSettings
    from mllm_shapx.config.models import ConnectorKwargs
    from mllm_shapx.models.base import Decoding
    from mllm_shapx.models.liquid_audio import load

    kwargs = ConnectorKwargs(dtype="float32")
    model = load(ModelSettings("liquid_audio", str(folder), kwargs=kwargs, device="cpu"), folder, None)
    decoding = Decoding(max_new_tokens=8)
    found: list[str] = []
    for start in range(0, len(recordings), batch_size):
        prompts = []
        for recording in recordings[start : start + batch_size]:
            messages = (
                Message(role=Role.SYSTEM, text=SYSTEM_PROMPT),
                Message(role=Role.USER, content=(AudioPart(recording.wav(), RATE),)),
            )
            snapshot = ConversationSnapshot.from_turns(tuple(Turn(messages=(each,)) for each in messages))
            prompts.append(model.encode(snapshot, decoding))
        found += [answer.text for answer in model.answer(prompts, decoding, [0] * len(prompts))]
    return found


def check(folder: Path, rows: Sequence[Recording], settings: Settings, min_accuracy: float) -> int:
    """Print the share of right answers on recordings outside the training; return 1 if it is too small."""
    rng = np.random.default_rng(settings.seed + 2000)
    cases = {
        "rows, whole recordings": list(rows),
        "rows, random coalitions": [draw_coalition(rng, row) for row in rows for _ in range(20)],
        "other recordings": [draw_recording(rng) for _ in range(200)],
    }
    worst = 1.0
    for name, recordings in cases.items():
        said = answers(folder, recordings)
        right = sum(text == recording.answer for text, recording in zip(said, recordings, strict=True))
        worst = min(worst, right / len(recordings))
        print(f"{name}: {right} of {len(recordings)} answers right", flush=True)
    if worst < min_accuracy:
        print(f"too few answers are right ({worst:.1%}, wanted {min_accuracy:.1%}): raise --steps")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
