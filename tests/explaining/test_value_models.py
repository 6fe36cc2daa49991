"""Value functions that load a model of their own: tiny ones with random weights, from a directory."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from explaining_kit import WORDS, RuleBackend, explain, row_of, runs_of
from mllm_shap import ExplainRunner

from mllm_shapx.cli import main
from mllm_shapx.errors import ModelChangedError, ModelError
from mllm_shapx.explaining.sample import open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config
from mllm_shapx.explaining.value_models import value_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bertscore": ("encoder", {"layer": 1}),
    "semascore": ("encoder", {}),
    "nli_logodds": ("model", {"question": "What jumps?"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a tiny encoder and a tiny classifier of entailment with a word-piece tokenizer."""
    import torch
    import transformers as hf
    from tokenizer_kit import tokenizer_of

    folder = tmp_path_factory.mktemp("value_models")
    tokenizer = tokenizer_of("wordpiece", None)
    tokenizer.pad_token = "[UNK]"  # noqa: S105
    tokenizer.model_max_length = 64
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
    }
    torch.manual_seed(3)
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    classifier = hf.BertConfig(**shape, id2label=labels, label2id={name: n for n, name in labels.items()})
    hf.BertModel(hf.BertConfig(**shape)).save_pretrained(folder / "encoder")
    hf.BertForSequenceClassification(classifier).save_pretrained(folder / "model")
    for name in ("encoder", "model"):
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("encoder", "model")}


def run_of(name: str, directory: Path, explainer: dict[str, Any]) -> Any:
    key, options = CASES[name]
    shap = {"value_function": name, "value_options": {key: str(directory), **options}}
    (run,) = runs_of(explainer, shap=shap)
    return replace(run, value_model=value_model(run, None))


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize(
    "explainer", [{"explainer_type": "exact"}, {"explainer_type": "neyman", "linear": 2}]
)
def test_values_are_the_librarys(models: dict[str, Path], name: str, explainer: dict[str, Any]) -> None:
    run = run_of(name, models[CASES[name][0]], explainer)
    row = row_of(" ".join(WORDS[:5]), row_index=3)
    config = explain_config(run, GameSettings(run.explainer_type, run.budget, run.seed_for(3)), 5)
    snapshot = open_row(row, run).snapshot
    theirs = asyncio.run(ExplainRunner(config, backend=RuleBackend()).explain(snapshot)).result
    ours = explain(row, run)
    assert len(set(ours.raw_values or ())) > 1, "a game that tells players apart"
    assert ours.player_values() == pytest.approx(list(theirs.values), abs=1e-9)
    assert ours.grand_value == pytest.approx(theirs.grand_value, abs=1e-9)


def test_a_directory_that_is_written_to_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(models["encoder"], tmp_path / "copy"))
    run = run_of("bertscore", copy, {"explainer_type": "exact"})
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(ModelChangedError, match="not the ones that the study began with"):
        explain(row_of("red fox"), run)


def test_validate_names_the_model_that_is_not_there(tmp_path: Path) -> None:
    config = {
        "experiment_set_id": "study",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(Path(__file__).parents[2] / "demo" / "model")},
        "dataset": {"source": "local_csv", "path": "rows.csv"},
        "shap": {"value_function": "bertscore", "value_options": {"encoder": "./nowhere"}},
        "experiments": [{"explainer_type": "exact"}],
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(config))
    found = CliRunner().invoke(main, ["validate", "--config", str(path)])
    assert found.exit_code == 2
    assert "shap.value_options.encoder: there is no directory './nowhere'" in found.output
    (run,) = runs_of({"explainer_type": "exact"}, shap=config["shap"])
    with pytest.raises(ModelError, match=r"shap\.value_options\.encoder"):
        value_model(run, path)
