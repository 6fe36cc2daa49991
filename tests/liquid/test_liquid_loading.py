"""Loading LFM2-Audio checkpoints: what is repaired, what is refused in words, and what decodes speech."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liquid_kit import checkpoint, load_liquid, model, our_answers, random_chat
from safetensors.torch import load_file, save_file

from mllm_shapx.errors import ModelError, ResourceError, RowError
from mllm_shapx.models.base import Answer, Decoding
from mllm_shapx.models.liquid_checkpoint import read_config


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "model"))


def _edit(folder: Path, **changes: Any) -> bytes:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        block, _, name = key.partition("__")
        config[block][name] = value
    path.write_text(json.dumps(config))
    return path.read_bytes()


def test_whole_floats_in_a_config_are_repaired_in_memory(copy: Path) -> None:
    """Integer fields written as floats load and answer as before, and the user's file is left alone."""
    written = _edit(copy, lfm__hidden_size=64.0, lfm__num_hidden_layers=3.0, encoder__n_layers=1.0)
    loaded = load_liquid(copy)
    assert (copy / "config.json").read_bytes() == written
    chats, decoding = [random_chat(1)], Decoding(max_new_tokens=5)
    prompts = [loaded.encode(snapshot, decoding) for snapshot in chats]
    assert [each.steps for each in loaded.generate(prompts, decoding, [0])] == our_answers(chats, decoding, 1)


def test_repair_leaves_true_floats_and_old_names_right(copy: Path) -> None:
    """Only integer fields are touched: `block_ff_dim` becomes whole, theta and epsilon stay floats."""
    _edit(copy, lfm__block_ff_dim=192.0, lfm__norm_eps=1.0, lfm__theta=1000000.0, encoder__dropout=0.0)
    config = read_config(copy)
    assert repr(config["lfm"]["block_ff_dim"]) == "192"
    assert repr(config["lfm"]["norm_eps"]) == "1.0"
    assert repr(config["lfm"]["theta"]) == "1000000.0"
    assert repr(config["encoder"]["dropout"]) == "0.0"


def test_identity_says_what_was_loaded() -> None:
    """Connector, dtype and device are those of the weights in memory."""
    loaded = load_liquid(checkpoint(), dtype="auto", name="some/model", revision="abc", batch_size=7)
    identity = loaded.identity
    assert (identity.connector, identity.model_id, identity.revision) == ("liquid_audio", "some/model", "abc")
    assert (identity.dtype, identity.device) == ("float32", "cpu")
    assert loaded.max_batch_size == 7


def test_what_is_no_checkpoint_is_refused_in_words(copy: Path, tmp_path: Path) -> None:
    """No directory, no JSON, another model's config, no weights, cut weights: each its own message."""
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_liquid(tmp_path / "none")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="not a complete LFM2-Audio checkpoint"):
        load_liquid(copy)
    stored = load_file(checkpoint() / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if name.startswith("lfm")}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weights are missing"):
        load_liquid(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not a complete LFM2-Audio checkpoint"):
        load_liquid(copy)
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="connector 'hf_text'"):
        load_liquid(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_liquid(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_named() -> None:
    """Asking for CUDA where there is none is an error before anything is loaded."""
    with pytest.raises(ResourceError, match="cuda"):
        load_liquid(checkpoint(), device="cuda")


def test_audio_that_cannot_be_decoded_is_a_row_error() -> None:
    """A damaged recording that reached the model fails its row in words."""
    from liquid_kit import chat, spoken

    with pytest.raises(RowError, match="cannot be decoded") as raised:
        model().encode(chat(spoken(b"RIFF....WAVE")), Decoding(max_new_tokens=1))
    assert raised.value.reason == "bad_audio"


def test_a_checkpoint_without_a_decoder_says_so() -> None:
    """Frames of such a checkpoint give no waveform."""
    assert model().decode_audio(Answer("x", audio_frames=((1,) * 8,))) is None


def test_a_detokenizer_turns_frames_into_sound_on_the_cpu(copy: Path) -> None:
    """The checkpoint's `audio_detokenizer` is used on the model's own device: 80 ms of sound a frame."""
    from liquid_audio import LFM2AudioDetokenizer
    from transformers import Lfm2Config

    options: dict[str, Any] = {
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 32,
        "block_auto_adjust_ff_dim": False,
    }
    torch.manual_seed(0)
    detokenizer = LFM2AudioDetokenizer(Lfm2Config(**options, layer_types=["conv", "full_attention"]))
    folder = copy / "audio_detokenizer"
    folder.mkdir()
    # Published configs name the layers as another runtime does and hold whole numbers as floats.
    config = {**options, "layer_types": ["conv", "sliding_attention"], "hidden_size": 512.0}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(detokenizer.state_dict(), folder / "model.safetensors")
    loaded = load_liquid(copy)
    decoded = loaded.decode_audio(Answer("x", audio_frames=tuple((n,) * 8 for n in range(5))))
    assert decoded is not None
    samples, rate = decoded
    assert rate == 24_000
    assert len(samples) == pytest.approx(5 * 0.08 * rate, rel=0.25)
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("name", ["lfm.embed_tokens.weight", "lfm.layers.0.feed_forward.w1.weight"])
def test_a_model_that_holds_nan_gives_no_answers(copy: Path, name: str) -> None:
    """Logits that are not numbers are an error of the row, never an answer of token 0."""
    weights = load_file(copy / "model.safetensors")
    weights[name][3, 3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    loaded = load_liquid(copy)
    decoding = Decoding(max_new_tokens=5)
    prompts = [loaded.encode(random_chat(seed), decoding) for seed in range(3)]
    with pytest.raises(RowError, match="not finite numbers"):
        loaded.answer(prompts, decoding, [0, 0, 0])
