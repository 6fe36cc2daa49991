"""Trains the demo's small chat model from random weights, and writes its rows.

    python scripts/train_demo_model.py --out-model demo/model --out-rows demo/rows.parquet

The model learns `demo_task.answer_to` from prompts with random words deleted, as in the coalitions of an
explanation. Everything is seeded: on one machine, with one number of threads, two runs write the same
weights. The training excludes the rows' whole prompts.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_task import (
    ENGLISH,
    LANGUAGES,
    SYSTEM_PROMPT,
    Prompt,
    answer_to,
    demo_prompts,
    draw_coalition,
    draw_prompt,
)

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_NEW_TOKENS = 10
IGNORED = -100
ENGLISH_SHARE = 0.5
"""Share of English in the training prompts; English has about half of the planted words."""


@dataclass(frozen=True)
class Settings:
    """Settings of the model and its training."""

    seed: int
    steps: int
    batch_size: int
    threads: int
    learning_rate: float = 3e-3
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 320


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save and check; return 1 if too many answers are wrong."""
    options = parse(arguments)
    settings = Settings(
        seed=options.seed, steps=options.steps, batch_size=options.batch_size, threads=options.threads
    )
    rows = demo_prompts(settings.seed)
    write_rows(rows, options.out_rows)
    print(f"{len(rows)} rows -> {options.out_rows}", flush=True)
    tokenizer = build_tokenizer(settings)
    model = build_model(settings, tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, settings, frozenset(row.text for row in rows))
    save(model, tokenizer, options.out_model)
    print(f"model -> {options.out_model}", flush=True)
    cases = held_out_cases(rows, settings.seed, options.checks)
    return check(model, tokenizer, cases, options.min_accuracy)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Trains the demo's model and writes its rows.")
    parser.add_argument("--out-model", type=Path, default=Path("demo/model"), help="directory of the model")
    parser.add_argument("--out-rows", type=Path, default=Path("demo/rows.parquet"), help="file of the rows")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts per training step")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; part of what decides the weights"
    )
    parser.add_argument("--checks", type=int, default=200, help="prompts of each kind asked at the end")
    parser.add_argument(
        "--min-accuracy", type=float, default=0.99, help="share of right answers below which the script fails"
    )
    return parser.parse_args(arguments)


def write_rows(rows: Sequence[Prompt], path: Path) -> None:
    """Write the demo's rows as parquet, one row per prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "prompt": [row.text for row in rows],
            "planted_word": [row.planted_word for row in rows],
            "planted_index": [row.planted_index for row in rows],
            "language": [row.language for row in rows],
            "token_count": [len(row.words) for row in rows],
        }
    )
    pq.write_table(table, path)


def build_tokenizer(settings: Settings) -> Any:
    """Return a byte-level tokenizer for any text, with few tokens for the task's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary_text(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def vocabulary_text() -> list[str]:
    """Return every word and sentence of the task."""
    text = [SYSTEM_PROMPT]
    for language in LANGUAGES:
        text += sorted(language.words())
        text += [language.neutral, *language.sentences.values(), *language.polite.values()]
    return text


def build_model(settings: Settings, tokenizer: Any) -> Any:
    """Return an untrained Llama of the demo's size, with weights drawn from the seed."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def train(model: Any, tokenizer: Any, settings: Settings, held_out: frozenset[str]) -> None:
    """Train the model on the answers; the loss counts only the answers' tokens."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    warmup = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warmup, settings.steps)
    )
    examples = training_examples(random.Random(settings.seed + 1), tokenizer, held_out)
    model.train()
    began = time.monotonic()
    for step in range(1, settings.steps + 1):
        batch = [next(examples) for _ in range(settings.batch_size)]
        loss = model(**as_tensors(batch, tokenizer.pad_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == settings.steps:
            elapsed = time.monotonic() - began
            print(f"step {step}/{settings.steps}  loss {loss.item():.4f}  {elapsed:.0f} s", flush=True)
    model.eval()


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the learning rate's factor at `step`: linear warm-up, then cosine decay."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def training_examples(
    rng: random.Random, tokenizer: Any, held_out: frozenset[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield an endless sequence of (prompt ids, answer ids), of whole prompts and of parts of them."""
    while True:
        language = ENGLISH if rng.random() < ENGLISH_SHARE else rng.choice(LANGUAGES[1:])
        prompt = draw_prompt(rng, language)
        if prompt.text in held_out:
            continue
        words = prompt.words if rng.random() < 0.3 else draw_coalition(rng, prompt.words)
        if rng.random() < 0.1:
            words = tuple(rng.sample(words, len(words)))
        system = SYSTEM_PROMPT if rng.random() < 0.9 else None
        messages = user_messages(rng, words)
        prompt_ids = tokenizer.encode(render(tokenizer, messages, system))
        yield prompt_ids, [*tokenizer.encode(answer_to(words)), tokenizer.eos_token_id]


def user_messages(rng: random.Random, words: Sequence[str]) -> list[str]:
    """Return the words as one message, sometimes as two."""
    if rng.random() < 0.9:
        return [" ".join(words)]
    cut = rng.randint(0, len(words))
    return [" ".join(words[:cut]), " ".join(words[cut:])]


def render(tokenizer: Any, messages: Sequence[str], system: str | None = SYSTEM_PROMPT) -> str:
    """Return the chat up to the start of the answer."""
    chat = [] if system is None else [{"role": "system", "content": system}]
    chat += [{"role": "user", "content": message} for message in messages]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def as_tensors(batch: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Any]:
    """Return a batch padded on the right, (batch, longest) each; prompts and padding have no label."""
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids, mask, labels = [], [], []
    for prompt, answer in batch:
        padding = longest - len(prompt) - len(answer)
        ids.append([*prompt, *answer, *[pad_id] * padding])
        mask.append([1] * (longest - padding) + [0] * padding)
        labels.append([*[IGNORED] * len(prompt), *answer, *[IGNORED] * padding])
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a directory for `from_pretrained`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in sorted(directory.glob("*.json")):
        # One format for all files: readable diffs, a newline at the end.
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def answers(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 128) -> list[str]:
    """Return the model's greedy answers to user messages, in order."""
    import torch

    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        prompts = [render(tokenizer, [text]) for text in texts[start : start + batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return found


def held_out_cases(rows: Sequence[Prompt], seed: int, count: int) -> dict[str, list[tuple[str, ...]]]:
    """Return kind -> test prompts, as words: all rows, and `count` of every other kind."""
    rng = random.Random(seed + 2)
    drawn = [draw_prompt(rng, rng.choice(LANGUAGES)) for _ in range(count)]
    return {
        "rows, whole prompts": [row.words for row in rows],
        "rows, random coalitions": [draw_coalition(rng, rng.choice(rows).words) for _ in range(count)],
        "other prompts": [prompt.words for prompt in drawn],
        "other prompts, random coalitions": [draw_coalition(rng, prompt.words) for prompt in drawn],
    }


def check(
    model: Any, tokenizer: Any, cases: Mapping[str, Sequence[tuple[str, ...]]], min_accuracy: float
) -> int:
    """Print the share of right answers; return 1 if it is too small."""
    worst = 1.0
    for name, prompts in cases.items():
        said = answers(model, tokenizer, [" ".join(words) for words in prompts])
        right = sum(text == answer_to(words) for text, words in zip(said, prompts, strict=True))
        worst = min(worst, right / len(prompts))
        print(f"{name}: {right} of {len(prompts)} answers right", flush=True)
    if worst < min_accuracy:
        print(f"too few answers are right ({worst:.1%}, wanted {min_accuracy:.1%}): raise --steps")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
