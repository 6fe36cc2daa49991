"""Models and studies that benchmarks make up."""

import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mllm_shap import ConversationSnapshot, Message, Role, Turn

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
SYLLABLES = ("ba", "ko", "mi", "tu", "re", "sol", "fen", "dar", "lim", "voy", "gas", "pel")


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


def write_study(
    folder: Path,
    model: Path,
    lengths: Sequence[int],
    experiments: Sequence[dict[str, Any]],
    *,
    new_tokens: int,
    name: str = "study",
) -> Path:
    """Write rows of so many distinct random words, and a config that explains them; return its path."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(400)})
    prompts = [" ".join(rng.sample(words, length)) for length in lengths]
    pq.write_table(pa.table({"prompt": prompts}), folder / "rows.parquet")
    config = {
        "experiment_set_id": name,
        "output_root": str(folder / "out"),
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(model), "dtype": "float32"},
        "device": "cpu",
        "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
        "selection": {"shuffle_seed": None},
        "generation": {"max_new_tokens": new_tokens, "text_temperature": 0.0},
        "wandb": {"enabled": False},
        "experiments": list(experiments),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path
