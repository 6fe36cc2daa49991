"""Models that cannot be loaded, or not as they are: one message, exit code 2; and an adapter, end to end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_study import Study, untouched

ROOT = Path(__file__).parents[2]
ONE_RUN = [{"explainer_type": "limited_mc", "num_samples": [8]}]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a study of one row on a copy of the demo's model."""
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")
    return with_model(Study(tmp_path, rows=1, settings={"experiments": ONE_RUN}))


def with_model(study: Study, **kwargs: Any) -> Study:
    study.write_config(
        connector_kwargs={"model_id": str(study.folder / "model"), "dtype": "float32", **kwargs}
    )
    return study


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def without_head(model: Path) -> None:
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    whole.config.tie_word_embeddings = False
    whole.model.save_pretrained(model)


def layer_missing(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    change(model / "config.json", num_hidden_layers=config["num_hidden_layers"] + 1, layer_types=None)


def tokens_too_many(model: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"word{number}" for number in range(rows)])
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_head, "lacks 1 weight (lm_head.weight)"),
        (layer_missing, "lacks 9 weights"),
        (tokens_too_many, "has embeddings for"),
    ],
)
def test_what_only_loading_shows_ends_the_study_with_one_message(
    study: Study, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(study.folder / "model")
    end = study.call("--inline")
    assert end.code == 2
    assert end.out.count("error: ") == 1
    assert words in end.out
    assert str(study.folder / "model") in end.out
    assert study.samples_on_disk() == 0
    assert not list(study.output.glob("*/failures/*"))


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def encoder_decoder(model: Path) -> None:
    change(model / "config.json", model_type="t5", is_encoder_decoder=True)


@pytest.mark.parametrize(("spoil", "words"), [(truncated, "truncated"), (encoder_decoder, "encoder-decoder")])
def test_what_the_files_show_is_said_before_anything_is_written(
    study: Study, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(study.folder / "model")
    with untouched(study.folder):
        end = study.call("--inline")
    assert end.code == 2
    assert end.out.startswith("error: ")
    assert words in end.out
    assert len(end.out) < 700


def test_an_adapter_is_explained_and_recorded(study: Study) -> None:
    """The adapter stands in spec.json, its commit beside the base's, and `--resume` without it is refused."""
    import peft
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(study.folder / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(whole, config).save_pretrained(study.folder / "adapter")
    with_model(study, adapter=str(study.folder / "adapter"))
    assert study.call("--inline").code == 0
    (spec,) = (json.loads(path.read_text()) for path in study.output.glob("*/spec.json"))
    settings = spec["result_settings"]
    assert settings["connector_kwargs"]["adapter"] == str(study.folder / "adapter")
    assert settings["model_commit"].count("+") == 1
    with_model(study)
    end = study.call("--inline", "--resume")
    assert end.code == 2
    assert "connector_kwargs.adapter" in end.out


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"quantization": "4bit"}, 'connector_kwargs.quantization: "4bit" needs CUDA'),
        ({"quantization": "2bit"}, "connector_kwargs.quantization"),
        ({"gguf_file": "../x.gguf"}, "inside the model's directory"),
        ({"gguf_file": "x.bin"}, "*.gguf"),
        ({"adapter": ""}, "is empty"),
        ({"trust_remote_code": "yes"}, "connector_kwargs.trust_remote_code"),
    ],
)
def test_settings_that_cannot_be_are_config_errors(study: Study, kwargs: dict[str, Any], words: str) -> None:
    with_model(study, **kwargs)
    end = study.call("--inline")
    assert end.code == 2
    assert words in end.out


def test_the_audio_connector_does_not_know_the_text_models_keys(study: Study) -> None:
    study.write_config(connector="liquid_audio", connector_kwargs={"adapter": "org/lora"})
    end = study.call("--inline")
    assert end.code == 2
    assert 'connector_kwargs.adapter: is not known to connector "liquid_audio"' in end.out
