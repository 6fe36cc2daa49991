"""Special tokens in rows are warned of before anything is loaded."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from tokenizer_kit import CHATML, ROOT, tokenizer_of

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config
from mllm_shapx.data.sources import open_table
from mllm_shapx.models.control_tokens import control_token_warnings, control_tokens, matcher
from mllm_shapx.planning.sweep import expand

END = "<|end|>"
"""A special token of the demo's model."""


def study(folder: Path, texts: Sequence[Any], model: Path = ROOT / "demo" / "model", **options: Any) -> Path:
    pq.write_table(pa.table({"prompt": texts}), folder / "rows.parquet")
    data = {
        "experiment_set_id": "study",
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(model), **options},
        "dataset": {"source": "local_parquet", "path": str(folder / "rows.parquet")},
        "selection": {"shuffle_seed": None},
        "wandb": {"enabled": False},
        "experiments": [{"explainer_type": "exact"}],
    }
    path = folder / "study.json"
    path.write_text(json.dumps(data))
    return path


def warnings(path: Path) -> tuple[str, ...]:
    loaded = load_config(path)
    run = expand(loaded.experiment_set).runs[0]
    table = open_table(loaded.experiment_set.dataset, loaded.path)
    return control_token_warnings(
        run.model_settings,
        loaded.path,
        table,
        range(table.num_rows),
        dataset=run.dataset,
        modality=run.modality,
    )


def test_validate_and_plan_count_the_rows_and_name_the_first(tmp_path: Path) -> None:
    """Once per config, on the error stream, and only where the dataset is looked at."""
    path = study(tmp_path, ["a quiet river", f"stop {END} now", "<| end |>", f"{END}{END}"])
    said = f"2 of 4 row(s) hold special tokens of the model (row 1: {END}); they become control tokens"
    for arguments in (["validate", "--check-dataset"], ["plan"]):
        result = CliRunner().invoke(main, [*arguments, "--config", str(path)])
        assert result.exit_code == 0
        assert result.stderr.count("control tokens") == 1
        assert said in result.stderr
    assert "control tokens" not in CliRunner().invoke(main, ["validate", "--config", str(path)]).stderr


def test_every_sentence_of_a_row_counts(tmp_path: Path) -> None:
    """Rows of several messages count once; empty ones are no trouble."""
    (warning,) = warnings(study(tmp_path, [["one", f"two {END}", END], [], None, ["three"]]))
    assert warning.startswith(f"1 of 4 row(s) hold special tokens of the model (row 0: {END})")


def test_plain_texts_give_no_warning(tmp_path: Path) -> None:
    """Nor do tokens that are not this model's, or a config that has them sanitized."""
    assert warnings(study(tmp_path, ["river", "<|im_end|>", "<think>"])) == ()
    sanitized = study(tmp_path, [END], chat_template_kwargs={"sanitize_control_tokens": True})
    assert warnings(sanitized) == ()


def test_files_tell_the_same_tokens_as_the_tokenizer(tmp_path: Path) -> None:
    """Special ones, and added ones that the template writes; also those of a config's own template."""
    template = CHATML + "{% if add_generation_prompt %}<think>{% endif %}"
    directory = tmp_path / "model"
    tokenizer = tokenizer_of("bpe_with_bos", template)
    tokenizer.add_tokens(["<b>", "\n\n"])
    tokenizer.save_pretrained(directory)
    tokens = control_tokens(tokenizer, None)
    assert {"<|im_end|>", "</s>", "<think>"} < set(tokens)
    assert not {"<b>", "\n\n"} & set(tokens)
    assert all(warnings(study(tmp_path, [f"x{token}y"], directory)) for token in tokens)
    assert warnings(study(tmp_path, ["<b>", "a\n\nb"], directory)) == ()
    assert warnings(study(tmp_path, ["<b>"], directory, chat_template="<b>{{ messages }}"))


def test_files_that_cannot_be_read_are_the_loaders_to_name(tmp_path: Path) -> None:
    """No tokenizer, damaged ones, other shapes: no warning and no error here."""
    directory = tmp_path / "model"
    directory.mkdir()
    assert warnings(study(tmp_path, [END], directory)) == ()
    for content in ("", "[]", "{", '{"added_tokens": {"a": 1}}', '{"added_tokens": [3, {"content": null}]}'):
        (directory / "tokenizer.json").write_text(content)
        (directory / "tokenizer_config.json").write_text(content)
        assert warnings(study(tmp_path, [END], directory)) == ()
    shutil.rmtree(directory)
    assert warnings(study(tmp_path, [END], Path("acme/no-such-model"))) == ()


def test_the_longest_of_overlapping_tokens_is_named() -> None:
    """As the tokenizer matches them."""
    pattern = matcher(["<|end|>", "<|end|>x", "<"])
    assert pattern is not None
    found = pattern.search("a <|end|>x")
    assert found is not None
    assert found.group() == "<|end|>x"
    assert matcher([]) is None
