"""Loading a text model: what is incomplete, is not causal or does not belong together is refused in words."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_kit import answer_in_batches, build_config, conversation, conversations, load_text_model
from safetensors.torch import load_file, save_file

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.base import Decoding, EmbeddingMode
from mllm_shapx.models.devices import Placement
from mllm_shapx.models.hf_loading import TextFiles, load_text
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.models.positions import position_limit

Directories = Callable[[str], Path]
DECODING = Decoding(max_new_tokens=8, logprobs=True)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def load(directory: Path, **files: Any) -> HfTextModel:
    """Load in float32 on the CPU."""
    return load_text_model(directory, **files)


def answers(model: HfTextModel) -> list[tuple[int, ...]]:
    """Return the tokens that a model answers a dozen prompts with."""
    return [answer.token_ids for answer in answer_in_batches(model, conversations(12), DECODING, 5)]


@pytest.fixture
def llama(model_directory: Directories, tmp_path: Path) -> Path:
    """Return a copy of a small Llama's directory, to be changed."""
    return Path(shutil.copytree(model_directory("llama"), tmp_path / "llama"))


def change_config(directory: Path, **keys: Any) -> None:
    """Write keys into a model's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def replace_model(directory: Path, model: Any) -> None:
    """Put another model's config and weights beside the tokenizer."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (directory / name).unlink(missing_ok=True)
    model.save_pretrained(directory)


# --- weights


def test_a_checkpoint_saved_without_its_head_is_refused_by_name(llama: Path) -> None:
    """Saved from `.model`, it would answer through a random head: other answers at every start."""
    import transformers

    replace_model(llama, transformers.AutoModelForCausalLM.from_pretrained(llama).model)
    with pytest.raises(ModelError, match=r"lacks 1 weight \(lm_head\.weight\) of 21.*whole causal language"):
        load(llama)


def test_a_tied_head_is_not_missing(llama: Path) -> None:
    """A head that is the embeddings' own matrix is in no checkpoint, saved with or without the head."""
    import transformers

    config = build_config("llama", 400)
    config.tie_word_embeddings = True
    whole = transformers.LlamaForCausalLM(config)
    replace_model(llama, whole)
    expected = answers(load(llama))
    replace_model(llama, whole.model)
    assert answers(load(llama)) == expected


def test_a_missing_layer_is_refused_and_a_layer_too_many_is_noted(llama: Path) -> None:
    """Config and weights disagree: what is missing would be random, what is left over is not read."""
    change_config(llama, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 weights \(model\.layers\.2\.\S+, .*, …\) of 30"):
        load(llama)
    change_config(llama, num_hidden_layers=1)
    notes = "".join(load(llama).notes)
    assert "holds 9 weights (model.layers.1." in notes
    assert "does not use" in notes


def test_weights_of_another_shape_are_refused_with_both_shapes(llama: Path) -> None:
    """The config's sizes are not the checkpoint's."""
    change_config(llama, intermediate_size=80)
    with pytest.raises(ModelError, match=r"has 6 weights .*another shape .*\(48, 96\) instead of \(48, 80\)"):
        load(llama)


def test_one_absent_tensor_is_refused(llama: Path) -> None:
    """A checkpoint that lost a tensor is told from one that is whole."""
    path = llama / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weight \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load(llama)


def test_nothing_of_the_loading_report_is_printed(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The one message says it; transformers' table beside it would be a second."""
    change_config(llama, num_hidden_layers=3)
    with pytest.raises(ModelError):
        load(llama)
    assert "MISSING" not in "".join(capfd.readouterr())


# --- kinds of models


def test_a_masked_language_model_is_no_causal_one_unless_it_is_a_decoder(llama: Path) -> None:
    """Transformers loads BERT into a decoder's class, where every token sees those behind it."""
    import transformers

    config = transformers.BertConfig(vocab_size=400, **TINY)
    replace_model(llama, transformers.BertForMaskedLM(config))
    change_config(llama, architectures=None)
    with pytest.raises(ModelError, match=r"masked language model \(model_type 'bert'\).*is_decoder"):
        load(llama)
    config.is_decoder = True
    replace_model(llama, transformers.BertLMHeadModel(config))
    assert len(set(answers(load(llama)))) > 1


def test_a_kind_that_is_not_causal_is_named_in_one_short_message(llama: Path) -> None:
    """Transformers would list its hundreds of classes."""
    import transformers

    config = transformers.T5Config(vocab_size=400, d_model=32, num_layers=1, num_heads=4, d_ff=64, d_kv=8)
    replace_model(llama, transformers.T5ForConditionalGeneration(config))
    with pytest.raises(ModelError, match="model_type 't5'") as caught:
        load(llama)
    assert len(str(caught.value)) < 300


def test_a_decoder_of_an_encoder_decoder_family_saved_as_such_is_taken(llama: Path) -> None:
    """`BartForCausalLM` is a causal language model of its own."""
    import transformers

    config = transformers.BartConfig(
        vocab_size=400, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    replace_model(llama, transformers.BartForCausalLM(config))
    assert len(answers(load(llama))) == 12


# --- tokenizers


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_with_both_sizes(llama: Path) -> None:
    """Its further tokens would end every row in an IndexError."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokens = len(tokenizer)
    tokenizer.add_tokens(["aardvark", "zyzzyva"])
    tokenizer.save_pretrained(llama)
    with pytest.raises(ModelError, match=rf"tokenizer has {tokens + 2} tokens .* embeddings for {tokens}"):
        load(llama)


def test_a_token_of_the_template_without_an_embedding_is_refused(llama: Path) -> None:
    """Chat tokens that were added to the tokenizer alone come with every prompt."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    tokenizer.save_pretrained(llama)
    with pytest.raises(ModelError, match="embeddings for"):
        load(llama)


def test_a_padding_token_without_an_embedding_is_no_fault(llama: Path) -> None:
    """Padding is masked; only a prompt that writes it out is refused, as its row's fault."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    before = answers(load(llama))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(llama)
    model = load(llama)
    assert answers(model) == before
    with pytest.raises(RowError, match=r"token '<pad>'.*the model does not"):
        model.encode(conversation("a <pad> b"), DECODING)


# --- adapters


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Save a LoRA adapter with random weights on the model in `base`."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def generated_alone(model: Any, tokenizer: Any) -> list[tuple[int, ...]]:
    """Answer the dozen prompts with the model's own `generate`, one at a time."""
    found = []
    for snapshot in conversations(12):
        chat = [{"role": each.role.value, "content": each.text} for each in snapshot.messages()]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text)])
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=DECODING.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        found.append(tuple(new[0, ids.shape[1] :].tolist()))
    return found


def test_an_adapter_is_applied_and_answers_as_pefts_own_model_does(llama: Path, tmp_path: Path) -> None:
    """The adapted model is batched like any other, and its answers are not the base's."""
    import peft
    import transformers

    adapter = make_adapter(llama, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(llama), adapter
    ).eval()
    expected = generated_alone(reference, transformers.AutoTokenizer.from_pretrained(llama))
    model = load(llama, adapter=str(adapter))
    assert answers(model) == expected
    assert answers(load(llama)) != expected
    assert model.decoder.shares_beginnings(16)
    assert f"adapter {adapter} is applied to model {llama}" in model.notes


def test_an_adapter_on_another_base_than_its_own_is_noted(llama: Path, tmp_path: Path) -> None:
    """A fine-tuned base may be meant; a mistaken one may fit all the same."""
    adapter = make_adapter(llama, tmp_path / "adapter")
    other = shutil.copytree(llama, tmp_path / "finetuned")
    assert f"it was trained on {llama}" in "".join(load(other, adapter=str(adapter)).notes)


def test_an_adapters_own_tokenizer_and_template_are_used(llama: Path, tmp_path: Path) -> None:
    """It was trained with them."""
    import transformers

    adapter = make_adapter(llama, tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(adapter)
    prompt = load(llama, adapter=str(adapter)).encode(conversations(3)[2], DECODING)
    assert prompt.length < load(llama).encode(conversations(3)[2], DECODING).length


@pytest.mark.parametrize("change", ["fewer layers in the base", "a tensor less"])
def test_an_adapter_of_another_model_is_refused(llama: Path, tmp_path: Path, change: str) -> None:
    """PEFT drops what does not fit without an error."""
    adapter = make_adapter(llama, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    if change == "a tensor less":
        weights.pop(min(weights))
    else:
        weights |= {name.replace("layers.1.", "layers.5."): value.clone() for name, value in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"adapter '.*' does not belong to model '.*': it (lacks 1 weight|has 4)"
    ):
        load(llama, adapter=str(adapter))


def test_an_adapter_for_modules_that_the_model_lacks_is_refused(
    llama: Path, model_directory: Directories, tmp_path: Path
) -> None:
    """A LoRA of a Llama on a GPT-2 finds nothing to adapt."""
    adapter = make_adapter(llama, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"cannot load adapter .*gpt2.*[Tt]arget modules"):
        load(model_directory("gpt2"), adapter=str(adapter))


def test_a_learned_prompt_is_refused_as_one(llama: Path, tmp_path: Path) -> None:
    """Prompt tuning puts vectors before every prompt, which this loader would lose."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="is a learned prompt"):
        load(llama, adapter=str(tmp_path / "prompt"))


# --- several devices


def spread(directory: Path, folder: Path) -> HfTextModel:
    """Load with the first layer in memory and the second on the disk."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        inner = transformers.AutoModelForCausalLM.from_config(config).model
    places = {f"model.{name}": "cpu" for name, _ in inner.named_children() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    placement = Placement(torch.device("cpu"), {"device_map": places, "offload_folder": str(folder)})
    loaded = load_text(TextFiles(str(directory)), placement, torch.float32)
    settings = ModelSettings("hf_text", str(directory))
    return HfTextModel(loaded, settings, load(directory).identity)


@pytest.mark.parametrize("architecture", ["llama", "gemma2_hybrid", "lfm2_hybrid"])
def test_a_model_spread_over_two_places_answers_as_the_whole_one(
    model_directory: Directories, architecture: str, tmp_path: Path
) -> None:
    """Answers, log-probabilities and states are equal; prompts go in where the embeddings lie."""
    directory = model_directory(architecture)
    plain, parts = load(directory), spread(directory, tmp_path)
    assert "the model is spread over 2 devices: cpu, disk" in parts.notes
    assert not parts.decoder.shares_beginnings(16), "caches of several devices are generate's"
    given = conversations(12)
    expected = answer_in_batches(plain, given, DECODING, 5)
    found = answer_in_batches(parts, given, DECODING, 5)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert len({each.text for each in expected}) > 6
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other.logprobs or (), one.logprobs or (), atol=1e-4)
    modes: tuple[EmbeddingMode, ...] = ("STATIC", "CONTEXTUAL")
    for mode in modes:
        states = parts.embed(found, mode, "MeanReducer")
        for ours, theirs in zip(states, plain.embed(expected, mode, "MeanReducer"), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- positions

FAMILIES_WITH_TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 24},
    "opt": {"max_position_embeddings": 24, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "gpt_neo": {
        "max_position_embeddings": 24, "num_layers": 2, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 1]],
    },
    "codegen": {"n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8},
    "gptj": {"n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8},
    "biogpt": {"max_position_embeddings": 24},
    "ctrl": {"n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 32},
    "openai-gpt": {"n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4},
    "gpt_bigcode": {"n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4},
    "mpt": {"max_seq_len": 24, "d_model": 32, "n_layers": 1, "n_heads": 4},
}  # fmt: skip
FAMILIES_WITHOUT: dict[str, dict[str, Any]] = {
    "xglm": {
        "max_position_embeddings": 24,
        "d_model": 32,
        "num_layers": 1,
        "attention_heads": 4,
        "ffn_dim": 32,
    },
    "llama": {**TINY, "max_position_embeddings": 24},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "gpt_neox": {**TINY, "max_position_embeddings": 24},
}


def build(kind: str, options: dict[str, Any]) -> Any:
    """Return a small random model of a family."""
    import transformers

    config = transformers.AutoConfig.for_model(
        kind, **{"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **TINY, **options}
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def read(model: Any, tokens: int) -> None:
    """Let `generate` read so many tokens."""
    ids = torch.arange(tokens)[None] % 50 + 5
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize("kind", FAMILIES_WITH_TABLES)
def test_the_limit_of_a_table_of_positions_is_where_generate_breaks(kind: str) -> None:
    """24 tokens can be read and 25 cannot: on a GPU the 25th would break the whole process."""
    model = build(kind, FAMILIES_WITH_TABLES[kind])
    assert position_limit(model) == 24
    read(model, 24)
    with pytest.raises((IndexError, RuntimeError)):
        read(model, 25)


@pytest.mark.parametrize("kind", FAMILIES_WITHOUT)
def test_computed_positions_have_no_limit(kind: str) -> None:
    """Rotary, ALiBi and growing sinusoidal positions go on behind the config's number."""
    model = build(kind, FAMILIES_WITHOUT[kind])
    assert position_limit(model) is None
    read(model, 60)


def test_a_prompt_is_refused_only_when_a_token_would_be_read_behind_the_table(
    model_directory: Directories,
) -> None:
    """GPT-2's 160 positions: the last new token is written and not read, as in `generate`."""
    model = load(model_directory("gpt2"))
    length = model.encode(conversation("seven small birds"), DECODING).length
    decoding = Decoding(max_new_tokens=161 - length)
    prompt = model.encode(conversation("seven small birds"), decoding)
    assert model.answer([prompt, prompt], decoding, [0, 0])
    with pytest.raises(RowError, match=rf"has {length} tokens.*the 160 positions"):
        model.encode(conversation("seven small birds"), Decoding(max_new_tokens=162 - length))


# --- code and files of other kinds

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_model"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_when_it_is_trusted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `trust_remote_code` the refusal says the word; with it the model answers as its class does."""
    expected = answers(load(llama))
    (llama / "own.py").write_text(CODE)
    change_config(
        llama,
        model_type="own_model",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    with pytest.raises(ModelError, match=r"code of its own.*connector_kwargs\.trust_remote_code to true"):
        load(llama)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert answers(load(llama, trust_remote_code=True)) == expected


def test_a_gguf_file_gives_the_model_that_it_was_made_from(llama: Path) -> None:
    """Weights, tokenizer and template come out of the one file."""
    from gguf_kit import write_gguf

    expected = answers(load(llama))
    alone = llama.parent / "gguf"
    alone.mkdir()
    write_gguf(llama, alone / "tiny.gguf")
    assert answers(load(alone, gguf_file="tiny.gguf")) == expected


def test_quantization_without_cuda_says_what_it_needs(llama: Path) -> None:
    """Bitsandbytes runs on CUDA; on the CPU the setting is refused in words."""
    with pytest.raises(ModelError, match=r"connector_kwargs\.quantization.*CUDA"):
        load(llama, quantization="4bit")
