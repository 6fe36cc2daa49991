"""The model, the rows and the configs as they lie in the repository."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from demo_task import ROWS_PER_LANGUAGE, SYSTEM_PROMPT, answer_to, demo_prompts, draw_coalition
from train_demo_model import MAX_NEW_TOKENS, answers, render

from mllm_shapx.config.loading import load_config
from mllm_shapx.planning.sweep import expand

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(pq.read_table(ROOT / "demo" / "rows.parquet").to_pylist())


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = ROOT / "demo" / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), tokenizer


def test_rows_are_what_the_script_draws(rows: list[dict[str, Any]]) -> None:
    """The parquet is not older or newer than the script that writes it."""
    assert [row["prompt"] for row in rows] == [prompt.text for prompt in demo_prompts(7)]


def test_rows_name_their_planted_word_and_count_their_players(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        words = row["prompt"].split()
        assert words[row["planted_index"]] == row["planted_word"]
        assert len(words) == len(set(words)) == row["token_count"]
        assert 6 <= row["token_count"] <= 9
    languages = [row["language"] for row in rows]
    assert {code: languages.count(code) for code in languages} == ROWS_PER_LANGUAGE


def test_model_answers_every_row(shipped: tuple[Any, Any], rows: list[dict[str, Any]]) -> None:
    model, tokenizer = shipped
    said = answers(model, tokenizer, [row["prompt"] for row in rows])
    assert said == [answer_to(row["prompt"].split()) for row in rows]


def test_model_answers_what_deletion_leaves_of_a_row(
    shipped: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    """Coalitions have a right answer too, the empty one included: the values mean something."""
    model, tokenizer = shipped
    rng = random.Random(1)
    coalitions = [draw_coalition(rng, row["prompt"].split()) for row in rows for _ in range(8)] + [()]
    said = answers(model, tokenizer, [" ".join(words) for words in coalitions])
    wrong = sum(text != answer_to(words) for text, words in zip(said, coalitions, strict=True))
    assert wrong <= len(coalitions) // 100


def test_answers_end_within_the_config_s_tokens(shipped: tuple[Any, Any]) -> None:
    """No answer is cut: the end token fits into `max_new_tokens`."""
    tokenizer = shipped[1]
    longest = max(len(tokenizer.encode(answer_to(prompt.words))) for prompt in demo_prompts(7))
    assert longest + 1 <= MAX_NEW_TOKENS
    assert load_config(ROOT / "configs" / "demo.json").experiment_set.generation.max_new_tokens == 10


def test_tokenizer_gives_any_text_back(shipped: tuple[Any, Any]) -> None:
    """The model can be asked about words that it never saw: nothing is unknown to a byte-level tokenizer."""
    tokenizer = shipped[1]
    text = "Zażółć gęślą jaźń, 42 Ω!"
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert render(tokenizer, ["a b"]) == (f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>a b<|end|><|assistant|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_demo_stays_small() -> None:
    """A clone must not pay for the demo."""
    model = ROOT / "demo" / "model"
    size = sum(path.stat().st_size for path in [*model.iterdir(), ROOT / "demo" / "rows.parquet"])
    assert size < 6_000_000
    assert json.loads((model / "config.json").read_text())["model_type"] == "llama"


def test_demo_config_is_a_sweep_of_exact_and_three_samplers() -> None:
    config = load_config(ROOT / "configs" / "demo.json")
    assert config.warnings == ()
    assert [run.name for run in expand(config.experiment_set).runs] == [
        "exact",
        "limited_mc_frac0_3",
        "standard_cc_ns32",
        "limited_neyman_lin1_0",
    ]


def test_example_of_a_study_is_valid() -> None:
    config = load_config(ROOT / "configs" / "study_example.json")
    assert config.warnings == ()
    sweep = expand(config.experiment_set)
    assert sweep.warnings == ()
    assert "hier_limited_mc_k4_imp0_1_frac0_5" in [run.name for run in sweep.runs]
