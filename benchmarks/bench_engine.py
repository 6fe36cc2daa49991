"""Measures the engine against mllm_shap's own backend and plain batched `generate`, on random Llamas.

All arms answer coalitions of the same prompt with the same model in one process, in turns; figures are
medians over the rounds. Ratios are of wall time and of CPU time, because other work on the machine distorts
wall time.

    python benchmarks/bench_engine.py --parameters 5m --rounds 3
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mllm_shap import (
    ConversationSnapshot,
    ExplainConfig,
    Message,
    PluginContext,
    Role,
    TransformersTextBackend,
    Turn,
    default_registry,
)
from mllm_shap.domain.config import GenerationConfig

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import ConnectorKwargs
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.engine import Engine
from mllm_shapx.models.hf_text import HfTextModel, load

SHAPES = {
    "5m": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688},
    "200m": {
        "hidden_size": 1024,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
    },
}
VOCABULARY = {"5m": 4000, "200m": 16000}
PROMPT = "please describe how a small river finds its way through old stone towns before the winter comes"
WORDS = tuple(PROMPT.split())
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM = "You are a helpful assistant."
RAW_BATCHES = (16, 64, 128, 256)


@dataclass(frozen=True)
class Speed:
    """Coalitions per second of wall time and of CPU time."""

    wall: float
    cpu: float


def build(parameters: str, directory: Path) -> None:
    """Save a random Llama of about `parameters` parameters, and a small tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False, initial_alphabet=alphabet)
    raw.train_from_iterator([" ".join(WORDS), SYSTEM, "<|system|> <|user|> <|assistant|>"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, pad_token="!")  # noqa: S106
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[parameters], vocab_size=VOCABULARY[parameters], eos_token_id=None, bos_token_id=0
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    count = sum(each.numel() for each in model.parameters()) / 1e6
    print(f"model: {count:.1f}M parameters, {torch.get_num_threads()} threads")


def coalitions(players: int) -> list[ConversationSnapshot]:
    """Return the conversations of all coalitions of the first `players` words."""
    found = []
    for chosen in itertools.product([0, 1], repeat=players):
        text = " ".join(word for word, present in zip(WORDS, chosen, strict=False) if present)
        messages = (Message(role=Role.SYSTEM, text=SYSTEM), Message(role=Role.USER, text=text))
        found.append(ConversationSnapshot.from_turns((Turn(messages=messages),)))
    return found


def measure(count: int, work: Callable[[], Any]) -> Speed:
    """Run `work` for `count` coalitions; return its speed."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Speed(count / (time.perf_counter() - wall), count / (time.process_time() - cpu))


def load_on_cpu(directory: Path) -> HfTextModel:
    """Load a directory in float32."""
    kwargs = ConnectorKwargs(dtype="float32")
    return load(ModelSettings("hf_text", str(directory), kwargs=kwargs, device="cpu"), directory, None)


class Bench:
    """The three arms over one model."""

    def __init__(self, directory: Path, snapshots: list[ConversationSnapshot], new_tokens: int) -> None:
        self.snapshots = snapshots
        self.decoding = Decoding(max_new_tokens=new_tokens)
        self.model = load_on_cpu(directory)
        settings = {"kind": "transformers", "model_id": str(directory), "options": {"dtype": "float32"}}
        config = ExplainConfig.model_validate({"backend": settings})
        self.library = TransformersTextBackend(PluginContext(config=config, registry=default_registry()))
        self.loop = asyncio.new_event_loop()
        self.engine = self.loop.run_until_complete(self._start())
        prompts = self.model.encode_all(snapshots, self.decoding)
        self.by_length = sorted((prompt.token_ids for prompt in prompts), key=len)

    async def _start(self) -> Engine:
        return Engine(self.model)

    def ours(self, part: Sequence[ConversationSnapshot]) -> Speed:
        """Answer with the engine."""
        call = self.engine.answer
        return measure(
            len(part),
            lambda: self.loop.run_until_complete(call(part, self.decoding, [0] * len(part))),
        )

    def one_by_one(self, part: Sequence[ConversationSnapshot]) -> Speed:
        """Answer with mllm_shap's backend, one prompt at a time."""
        generation = GenerationConfig(max_new_tokens=self.decoding.max_new_tokens)

        async def work() -> None:
            for snapshot in part:
                await self.library.generate(snapshot, generation)

        return measure(len(part), lambda: self.loop.run_until_complete(work()))

    def raw(self, size: int, batches: int) -> Speed:
        """Answer batches of prompts of similar length with `model.generate`, spread over the lengths."""
        from mllm_shapx.models.plain_generate import PromptBatch, generate

        most = len(self.by_length) - size
        starts = [most * place // max(1, batches - 1) for place in range(batches)] if most > 0 else [0]
        parts = [self.by_length[start : start + size] for start in starts]
        count = sum(map(len, parts))

        def work() -> None:
            decoder = self.model.decoder
            for part in parts:
                generate(decoder.model, decoder.settings, PromptBatch(part, self.decoding, [0] * len(part)))

        with torch.inference_mode():
            return measure(count, work)


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure all arms in turns and return the figures."""
    bench = Bench(directory, coalitions(options.players), options.new_tokens)
    step = max(1, len(bench.snapshots) // options.library_sample)
    sample = bench.snapshots[step // 2 :: step]
    bench.ours(bench.snapshots[: min(256, len(bench.snapshots))])
    bench.one_by_one(sample[:2])
    sizes = [size for size in RAW_BATCHES if size <= len(bench.snapshots)] or [len(bench.snapshots)]
    seen: dict[str, list[Speed]] = {name: [] for name in ("ours", "library", *map(str, sizes))}
    for round_ in range(options.rounds):
        seen["library"].append(bench.one_by_one(sample))
        for size in sizes:
            seen[str(size)].append(bench.raw(size, max(2, options.raw_prompts // size)))
        seen["ours"].append(bench.ours(bench.snapshots))
        print(
            f"round {round_ + 1}: " + ", ".join(f"{k} {v[-1].wall:.1f}/s" for k, v in seen.items()),
            flush=True,
        )
    figures = summary(seen, sizes)
    figures["batch_size"] = bench.engine.stats.batch_size
    bench.loop.run_until_complete(bench.engine.aclose())
    return figures


def summary(seen: dict[str, list[Speed]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return medians per arm and the ratios between them."""
    found: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        speed = {
            name: statistics.median(getattr(each, clock) for each in values) for name, values in seen.items()
        }
        best = max(sizes, key=lambda size: speed[str(size)])
        found[clock] = {
            "ours_per_s": round(speed["ours"], 1),
            "library_per_s": round(speed["library"], 2),
            "raw_per_s": {size: round(speed[str(size)], 1) for size in sizes},
            "raw_best_batch": best,
            "ratio": round(speed["ours"] / speed["library"], 2),
            "fraction_of_raw": round(speed["ours"] / speed[str(best)], 2),
        }
    return found


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", choices=sorted(SHAPES), default="5m")
    parser.add_argument("--players", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--library-sample", type=int, default=48, help="coalitions that the library answers")
    parser.add_argument("--raw-prompts", type=int, default=512, help="prompts per batch size of generate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(options.parameters, Path(folder))
        print(json.dumps(run(options, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
