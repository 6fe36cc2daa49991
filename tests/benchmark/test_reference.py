"""The library is compared with on the right prompts, for models of which its own are not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check_parity import main as check_parity
from click.testing import CliRunner
from mllm_shap.domain.config import GenerationConfig
from tokenizer_kit import CHATML, NO_SYSTEM, WITH_BOS, as_messages, chat, save_model

from mllm_shapx.benchmark.library import LibraryRunner
from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.planning.sweep import expand


def config_of(folder: Path, model: Path, **options: Any) -> Path:
    (folder / "rows.csv").write_text("prompt\nquiet old river\nwhy do birds sing\n")
    data = {
        "experiment_set_id": "study",
        "output_root": str(folder / "output"),
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(model), "dtype": "float32", **options},
        "device": "cpu",
        "dataset": {"source": "local_csv", "path": str(folder / "rows.csv")},
        "generation": {"max_new_tokens": 8, "text_temperature": 0.0},
        "wandb": {"enabled": False},
        "experiments": [{"explainer_type": "exact"}],
    }
    path = folder / "config.json"
    path.write_text(json.dumps(data))
    return path


def reference_of(config: Path, model: Path) -> LibraryRunner:
    run = expand(load_config(config).experiment_set).runs[0]
    return LibraryRunner(run, model)


@pytest.mark.parametrize(
    ("kind", "template", "options", "other"),
    [
        ("demo", CHATML, {}, False),
        ("bpe_with_bos", WITH_BOS, {}, True),
        ("bpe_with_bos", NO_SYSTEM, {}, True),
        ("bpe_with_bos", None, {}, False),
        ("bpe_with_bos", None, {"chat_template": WITH_BOS}, True),
    ],
)  # fmt: skip
def test_the_reference_answers_the_ids_of_apply_chat_template(
    tmp_path: Path, kind: str, template: str | None, options: dict[str, Any], other: bool
) -> None:
    """It says of which models the library's own prompts would have been others."""
    model = save_model(tmp_path / "model", kind, template)
    backend = reference_of(config_of(tmp_path, model, **options), model)

    async def ask() -> tuple[str, list[int]]:
        record = await backend.generate(chat("quiet old river"), GenerationConfig(max_new_tokens=8))
        assert backend._tokenizer is not None
        inputs = backend._encode(torch, None, backend._tokenizer, chat("quiet old river"))
        return record.text, inputs["input_ids"][0].tolist()

    text, ids = asyncio.run(ask())
    assert backend.makes_other_prompts is other
    tokenizer, network = backend._tokenizer, backend._model
    assert tokenizer is not None
    assert network is not None
    messages = as_messages(chat("quiet old river"))
    if template == NO_SYSTEM:
        messages = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}]
    own = options.get("chat_template", template)
    if own is not None:
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, chat_template=own, return_tensors="pt"
        )
        assert ids == expected["input_ids"][0].tolist()
        made = network.generate(**expected, max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = made[0, expected["input_ids"].shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_values_equal_the_librarys_for_a_model_of_two_bos_and_no_system_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study runs to its end; the parity script finds its values within 1e-9 and names its prompts."""
    model = save_model(tmp_path / "model", "bpe_with_bos", NO_SYSTEM)
    config = config_of(tmp_path, model)
    result = CliRunner().invoke(main, ["run", "--inline", "--config", str(config)])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(
        "sys.argv", ["check_parity.py", str(tmp_path / "output" / "study"), "--config", str(config)]
    )
    assert check_parity() == 0
    said = capsys.readouterr().out
    assert "2 sample(s) of 1 run(s)" in said
    assert "note: mllm_shap's own backend makes other prompts for this model (a second BOS" in said
