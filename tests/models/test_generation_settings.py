"""The generation config of a model is honoured as `generate` honours it, or its settings are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import answer_in_batches, conversations, load_text_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.generation_settings import read_settings
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.models.plain_generate import call_generate

NEW_TOKENS = 10
Directories = Callable[[str], Path]


def copy_with(source: Path, target: Path, **settings: Any) -> Path:
    """Copy a model and change its generation config."""
    shutil.copytree(source, target)
    file = target / "generation_config.json"
    ends = {"eos_token_id": AutoTokenizer.from_pretrained(target).eos_token_id}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ends, **settings}))
    return target


def load(directory: Path, **options: Any) -> HfTextModel:
    return load_text_model(directory, **options)


def alone(directory: Path, model: HfTextModel, count: int) -> list[list[int]]:
    """Return what transformers' `generate` says to each conversation at batch 1, greedily."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for snapshot in conversations(count):
        ids = torch.tensor([model.encode(snapshot, Decoding(max_new_tokens=NEW_TOKENS)).token_ids])
        output = call_generate(
            network,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def together(model: HfTextModel, count: int) -> list[list[int]]:
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    return [list(each.token_ids) for each in answer_in_batches(model, conversations(count), decoding, count)]


@pytest.mark.parametrize("architecture", ["llama", "lfm2_hybrid"])
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": [17, 98, 140, 222, 301]},
        {"min_length": 90},
        {"min_new_tokens": 6},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(200, 320)), "begin_suppress_tokens": list(range(100, 200))},
        {"bad_words_ids": [[token] for token in range(150, 250)]},
        {"sequence_bias": [[[token], -9.0] for token in range(60, 200)]},
        {"forced_eos_token_id": 98},
        {"exponential_decay_length_penalty": [2, 3.0], "eos_token_id": [17, 98]},
        {"num_beams": 4},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_length": 20},
    ],
    ids="+".join,
)
def test_a_setting_acts_in_a_batch_as_it_does_on_one_prompt(
    model_directory: Directories, tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    """Prompts of different lengths in one batch give, token for token, what each gives alone."""
    directory = copy_with(model_directory(architecture), tmp_path / "model", **settings)
    model = load(directory)
    expected = alone(directory, model, 24)
    assert together(model, 24) == expected
    if not {"num_beams", "do_sample"} & settings.keys():
        assert expected != alone(copy_with(model_directory(architecture), tmp_path / "plain"), model, 24)


def test_answers_end_at_any_of_the_models_stop_tokens() -> None:
    """A second stop token on a copy of the demo's model: three tokens instead of seven."""
    source = Path("demo/model")
    network = load(source).network
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the dog found gold"}], add_generation_prompt=True, return_dict=False
    )
    decoding = Decoding(max_new_tokens=12)
    whole = Decoder(network, read_settings(network, tokenizer)).answer([ids], decoding, [0])[0].token_ids
    network.generation_config.eos_token_id = [1, whole[2]]
    cut = Decoder(network, read_settings(network, tokenizer)).answer([ids], decoding, [0])[0].token_ids
    assert cut == whole[:3] != whole


def test_beam_search_is_replaced_with_a_word(model_directory: Directories, tmp_path: Path) -> None:
    """Temperature 0 is greedy whatever the model's defaults say, and sampling does not fail."""
    model = load(copy_with(model_directory("llama"), tmp_path / "model", num_beams=4))
    assert any("num_beams = 4" in note for note in model.notes)
    sampled = Decoding(max_new_tokens=NEW_TOKENS, text_temperature=0.7)
    assert len(answer_in_batches(model, conversations(8), sampled, 8)) == 8


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"stop_strings": ["the"]}, "stop strings"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"num_return_sequences": 3}, "several answers"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_honoured_refuses_the_model_by_its_name(
    model_directory: Directories, tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    """The message names the setting, what it asks for and the way out."""
    directory = copy_with(model_directory("llama"), tmp_path / "model", **settings)
    with pytest.raises(ModelError, match=f"{next(iter(settings))} = .*{what}.*generation_config.json"):
        load(directory)


@pytest.mark.parametrize("architecture", ["llama", "lfm2_hybrid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_an_error_of_the_row(
    model_directory: Directories, tmp_path: Path, architecture: str, value: float
) -> None:
    """Damaged or overflowing weights never become answers of token 0."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory(architecture), directory)
    network = AutoModelForCausalLM.from_pretrained(directory)
    network.lm_head.weight.data[5, 3] = value
    network.save_pretrained(directory)
    model = load(directory)
    with pytest.raises(RowError, match=r"not finite numbers.*bfloat16 or float32"):
        together(model, 4)


def test_an_overflow_in_float16_is_an_error_of_the_row(model_directory: Directories, tmp_path: Path) -> None:
    """A model whose states pass 65,504 has no answers in float16, and sound ones in float32."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory("llama"), directory)
    network = AutoModelForCausalLM.from_pretrained(directory)
    network.model.norm.weight.data *= 30_000.0
    network.save_pretrained(directory)
    assert len(together(load(directory), 4)) == 4
    half = load(directory, dtype="float16")
    with pytest.raises(RowError, match="float16 overflows"):
        together(half, 4)


def test_a_key_that_generate_does_not_know_slows_nothing_down(
    model_directory: Directories, tmp_path: Path
) -> None:
    """Published generation configs hold keys of other programs; one that `generate` reads still counts."""
    model = load(copy_with(model_directory("llama"), tmp_path / "junk", chat_format="chatml"))
    assert (model.decoder.way, model.notes) == ("own loop", ())
    model = load(copy_with(model_directory("llama"), tmp_path / "guided", guidance_scale=1.5))
    assert model.decoder.way == "generate, equal lengths"
