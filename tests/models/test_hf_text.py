"""The hf_text connector: the library's own texts and numbers, whatever the batch."""

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mllm_shap import AudioPart, ConversationSnapshot, Message, Role, Turn
from model_kit import ARCHITECTURES, answer_in_batches, conversations, library_records, load_text_model

from mllm_shapx.errors import ModelError, ResourceError, RowError
from mllm_shapx.models.base import Answer, Decoding, OutOfMemory
from mllm_shapx.models.hf_text import HfTextModel

Directories = Callable[[str], Path]
NEW_TOKENS = 10


@cache
def load(directory: Path) -> HfTextModel:
    """Load a model in float32 on the CPU, once."""
    return load_text_model(directory)


def texts_of(
    model: HfTextModel, snapshots: list[ConversationSnapshot], decoding: Decoding, size: int, seed: int = 0
) -> list[str]:
    """Answer in batches of `size` and return the texts."""
    return [answer.text for answer in answer_in_batches(model, snapshots, decoding, size, seed)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_and_logprobs_equal_the_librarys_backend_for_every_batch_size(
    model_directory: Directories, architecture: str
) -> None:
    """Greedy answers of mixed lengths are those of mllm_shap's backend at batch sizes 1, 3 and 16."""
    directory = model_directory(architecture)
    snapshots = conversations(20)
    expected = asyncio.run(library_records(directory, snapshots, NEW_TOKENS))
    model = load(directory)
    decoding = Decoding(max_new_tokens=NEW_TOKENS, logprobs=True)
    ends = {len(record.logprobs) for record in expected}
    assert len(ends) > 1, "the model should end answers at different times"
    for size in (1, 3, 16):
        answers = answer_in_batches(model, snapshots, decoding, size)
        assert [answer.text for answer in answers] == [record.text for record in expected]
        for answer, record in zip(answers, expected, strict=True):
            assert answer.logprobs is not None
            assert len(answer.logprobs) == len(answer.token_ids)
            np.testing.assert_allclose(answer.logprobs, record.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "own"),
    [("llama", True), ("gpt2", True), ("qwen2", True), ("gemma2_hybrid", True), ("lfm2_hybrid", False)],
)
def test_the_own_loop_is_taken_where_a_trial_shows_that_it_gives_what_generate_gives(
    model_directory: Directories, architecture: str, own: bool
) -> None:
    """Plain attention is answered by the own loop, a hybrid with convolutions by the model's `generate`."""
    model = load(model_directory(architecture))
    assert (model.decoder.way_for(16) == "own loop") is own


def test_prompts_beyond_a_sliding_window_are_answered_by_generate(model_directory: Directories) -> None:
    """The own loop lets every token see all before it, so that it stops where the window begins to matter."""
    decoder = load(model_directory("mistral_sliding")).decoder
    assert decoder.shares_beginnings(16)
    assert not decoder.shares_beginnings(17)


def test_a_repetition_penalty_of_the_generation_config_is_obeyed(
    model_directory: Directories, tmp_path: Path
) -> None:
    """The own loop applies it to each prompt without padding; texts equal the library's."""
    directory = tmp_path / "penalised"
    shutil.copytree(model_directory("llama"), directory)
    settings = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.7}))
    snapshots = conversations(12)
    plain = asyncio.run(library_records(model_directory("llama"), snapshots, NEW_TOKENS))
    expected = asyncio.run(library_records(directory, snapshots, NEW_TOKENS))
    assert [record.text for record in expected] != [record.text for record in plain]
    model = load(directory)
    assert model.decoder.way_for(16) == "own loop"
    decoding = Decoding(max_new_tokens=NEW_TOKENS, logprobs=True)
    answers = answer_in_batches(model, snapshots, decoding, 12)
    assert [answer.text for answer in answers] == [record.text for record in expected]
    for answer, record in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.logprobs or (), record.logprobs, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "lfm2_hybrid"])
def test_a_sampled_answer_hangs_on_its_own_seed_and_not_on_its_batch(
    model_directory: Directories, architecture: str
) -> None:
    """The same seeds give the same sampled texts at batch sizes 1, 4 and 12; other seeds give others."""
    model = load(model_directory(architecture))
    snapshots = conversations(12)
    decoding = Decoding(max_new_tokens=NEW_TOKENS, text_temperature=0.9, text_top_k=20)
    texts = {size: texts_of(model, snapshots, decoding, size) for size in (1, 4, 12)}
    assert texts[1] == texts[4] == texts[12]
    assert texts_of(model, snapshots, decoding, 12, seed=500) != texts[12]
    assert texts[12] != texts_of(model, snapshots, Decoding(max_new_tokens=NEW_TOKENS), 12)


def test_sampling_follows_the_distribution_of_generate(model_directory: Directories) -> None:
    """First tokens drawn with temperature and top-k come as often as the warped softmax says."""
    model = load(model_directory("llama"))
    snapshot = conversations(3)[2]
    decoding = Decoding(max_new_tokens=1, text_temperature=0.8, text_top_k=5)
    prompt = model.encode(snapshot, decoding)
    drawn = model.answer([prompt] * 4000, decoding, list(range(4000)))
    counts = np.bincount([answer.token_ids[0] for answer in drawn], minlength=400)
    with torch.inference_mode():
        logits = model.network(torch.tensor([prompt.token_ids])).logits[0, -1]
    top = logits.topk(5)
    shares = (top.values / 0.8).softmax(-1).numpy()
    assert counts[top.indices.numpy()].sum() == 4000
    np.testing.assert_allclose(counts[top.indices.numpy()] / 4000, shares, atol=0.03)


def test_top_k_of_one_is_greedy(model_directory: Directories) -> None:
    """With a single token to draw from, the temperature changes nothing."""
    model = load(model_directory("qwen2"))
    snapshots = conversations(8)
    sampled = Decoding(max_new_tokens=NEW_TOKENS, text_temperature=1.3, text_top_k=1)
    greedy = Decoding(max_new_tokens=NEW_TOKENS)
    assert texts_of(model, snapshots, sampled, 8) == texts_of(model, snapshots, greedy, 8)


def test_an_assistant_prefill_stands_behind_the_generation_prompt(model_directory: Directories) -> None:
    """The given beginning is part of the prompt's end and no part of the answer."""
    model = load(model_directory("llama"))
    snapshot = conversations(3)[1]
    bare = model.encode(snapshot, Decoding(max_new_tokens=4))
    begun = model.encode(snapshot, Decoding(max_new_tokens=4, assistant_prefill="rain sings"))
    end = model.tokenizer.decode(begun.token_ids)
    assert end == model.tokenizer.decode(bare.token_ids) + "rain sings"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_mean_embeddings_equal_the_librarys(model_directory: Directories, architecture: str) -> None:
    """Static and contextual means agree with mllm_shap's own to 1e-6, padded batches or not."""
    directory = model_directory(architecture)
    snapshots = conversations(9)
    expected = asyncio.run(library_records(directory, snapshots, NEW_TOKENS, embeddings=True))
    model = load(directory)
    answers = answer_in_batches(model, snapshots, Decoding(max_new_tokens=NEW_TOKENS), 9)
    for vector, record in zip(model.embed(answers, "STATIC", "MeanReducer"), expected, strict=True):
        np.testing.assert_allclose(vector, record.embedding, atol=1e-6)
    for vector, record in zip(model.embed(answers, "CONTEXTUAL", "MeanReducer"), expected, strict=True):
        np.testing.assert_allclose(vector, record.contextual_embedding, atol=2e-6)


def test_reducers_pool_over_the_tokens_of_each_answer_alone(model_directory: Directories) -> None:
    """Every reducer gives what numpy gives on the answer's own rows; no tokens give an empty vector."""
    model = load(model_directory("llama"))
    answers = [Answer("a", (5, 9, 2)), Answer("b", (7,)), Answer("")]
    table = model.network.get_input_embeddings().weight.detach().numpy().astype(np.float64)
    rows = table[[5, 9, 2]]
    expected = {
        "MeanReducer": rows.mean(0),
        "MaxReducer": rows.max(0),
        "MinReducer": rows.min(0),
        "SumReducer": rows.sum(0),
        "FirstReducer": rows[0],
        "ZeroReducer": rows.reshape(-1),
    }
    for reducer, vector in expected.items():
        found = model.embed(answers, "STATIC", reducer)
        np.testing.assert_allclose(found[0], vector)
        assert found[1].shape == (48,)
        assert found[2].shape == (0,)


def test_a_prompt_longer_than_learned_positions_is_refused_by_name(model_directory: Directories) -> None:
    """It is the row that is at fault: a RowError with the lengths, before the device is reached."""
    model = load(model_directory("gpt2"))
    decoding = Decoding(max_new_tokens=150)
    with pytest.raises(RowError, match=r"150 new ones.* 160 positions") as caught:
        model.encode(conversations(3)[2], decoding)
    assert caught.value.reason == "prompt_too_long"


def test_audio_is_refused_as_the_rows_fault(model_directory: Directories) -> None:
    """hf_text takes text only."""
    message = Message(role=Role.USER, content=(AudioPart(b"RIFF", 16000),))
    snapshot = ConversationSnapshot.from_turns((Turn(messages=(message,)),))
    with pytest.raises(RowError, match="takes text only"):
        load(model_directory("llama")).encode(snapshot, Decoding(max_new_tokens=2))


def test_a_batch_beyond_main_memory_is_refused_instead_of_killing_the_process(
    model_directory: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would not fit raises OutOfMemory, and one prompt still does."""
    model = load(model_directory("llama"))
    decoding = Decoding(max_new_tokens=4)
    prompts = [model.encode(snapshot, decoding) for snapshot in conversations(64)]
    monkeypatch.setattr("mllm_shapx.models.hf_text.free_memory", lambda: 1_000_000)
    with pytest.raises(OutOfMemory, match="64 prompts"):
        model.answer(prompts, decoding, [0] * 64)
    assert len(model.answer(prompts[:1], decoding, [0])) == 1


def test_a_directory_that_is_no_causal_model_is_a_model_error(tmp_path: Path) -> None:
    """Broken contents name the model and what model_id must be, without a traceback of transformers."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="causal language model"):
        load(tmp_path)


def test_a_device_that_is_not_there_is_named(model_directory: Directories) -> None:
    """Asking for the 64th GPU says how many there are."""
    with pytest.raises(ResourceError, match=r"'cuda:63' is not on this machine"):
        load_text_model(model_directory("llama"), device="cuda:63")


def test_bfloat16_weights_pass_the_trial(model_directory: Directories) -> None:
    """Rounding in half precision is not mistaken for a model that cannot be batched."""
    model = load_text_model(model_directory("llama"), dtype="bfloat16")
    assert model.identity.dtype == "bfloat16"
    assert model.decoder.way_for(16) == "own loop"


def test_a_model_that_does_not_fit_says_what_to_change(
    model_directory: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is full while loading is an error of resources, with the settings that help."""

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr("mllm_shapx.models.hf_text.Decoder", full)
    with pytest.raises(ResourceError, match=r"does not fit on cpu .*smaller dtype"):
        load_text_model(model_directory("llama"))
