"""Numbers and names with their bounds: each refusal says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mllm_shapx.cli import main
from mllm_shapx.config.loading import load_config, schema
from mllm_shapx.errors import ConfigError
from mllm_shapx.planning.sweep import MOST_RUNS, expand

USUAL: dict[str, Any] = {
    "experiment_set_id": "study",
    "connector": "hf_text",
    "dataset": {"source": "local_csv", "path": "rows.csv"},
}

HUGE = [
    ({"connector_kwargs": {"batch_size": 10**9}}, "connector_kwargs.batch_size", "memory"),
    ({"selection": {"start_index": 10**12}}, "selection.start_index", "rows"),
    ({"selection": {"max_samples": 10**12}}, "selection.max_samples", "rows"),
    ({"selection": {"max_prompt_tokens": 10**9}}, "selection.max_prompt_tokens", "players"),
    ({"generation": {"max_new_tokens": 10**9}}, "generation.max_new_tokens", "length"),
    ({"generation": {"text_top_k": 10**12}}, "generation.text_top_k", "vocabulary"),
    ({"generation": {"text_temperature": 1e9}}, "generation.text_temperature", "noise"),
    ({"audio_segmentation": {"window_ms": 1e12}}, "audio_segmentation.window_ms", "recording"),
    ({"embedding": {"model_id": "a/b", "max_length": 10**9}}, "embedding.max_length", "encoder"),
    ({"embedding": {"model_id": "a/b", "batch_size": 10**9}}, "embedding.batch_size", "memory"),
    (
        {"experiments": [{"explainer_type": "mc", "num_samples": [10**30]}]},
        "experiments[0].num_samples[0]",
        "2^24",
    ),
    (
        {"experiments": [{"explainer_type": "hierarchical", "hierarchical": {"ks": [10**9]}}]},
        "experiments[0].hierarchical.ks[0]",
        "players",
    ),
]


def written(folder: Path, data: dict[str, Any] | str) -> Path:
    path = folder / "study.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def called(*args: str) -> Result:
    found = CliRunner().invoke(main, list(args))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert "unexpected" not in found.output, found.output
    return found


@pytest.mark.parametrize(
    ("changes", "key", "reason"), HUGE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_huge_number_is_refused_with_its_reason(
    tmp_path: Path, changes: dict[str, Any], key: str, reason: str
) -> None:
    data = {"experiments": [{"explainer_type": "exact"}], **USUAL, **changes}
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, data))
    (problem,) = caught.value.problems
    assert problem.path == key
    assert "too large: at most" in problem.message
    assert reason in problem.message
    assert len(problem.message) < 200


def test_every_number_of_a_config_has_an_upper_bound() -> None:
    """A number that is added later gets one too: 1e300 is refused wherever a number may stand."""
    whole = schema()
    blocks = {"": whole, **whole["$defs"]}
    unbounded = [
        f"{block}.{name}"
        for block, definition in blocks.items()
        for name, field in definition.get("properties", {}).items()
        for part in [
            field,
            *field.get("anyOf", []),
            *(each.get("items", {}) for each in field.get("anyOf", [])),
        ]
        if part.get("type") in {"integer", "number"} and not {"maximum", "exclusiveMaximum"} & set(part)
    ]
    assert unbounded == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_what_is_no_number_is_refused(tmp_path: Path, number: str) -> None:
    text = json.dumps(
        {**USUAL, "experiments": [{"explainer_type": "exact"}], "generation": {"text_temperature": 7.5}}
    )
    with pytest.raises(ConfigError, match=r"text_temperature|is not JSON"):
        load_config(written(tmp_path, text.replace("7.5", number)))
    text = json.dumps(
        {
            **USUAL,
            "experiments": [{"explainer_type": "exact"}],
            "selection": {"filters": [{"column": "a", "op": "<", "value": 7.5}]},
        }
    )
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(written(tmp_path, text.replace("7.5", number)))


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--rows-in-flight", "1000000000", "in memory"),
        ("--rows-in-flight", "nan", "not a whole number"),
        ("--rows-in-flight", "9" * 5000, "not a whole number"),
        ("--num-workers", "1000000", "coordinator"),
        ("--num-gpus", "nan", "NaN is not a number"),
        ("--num-gpus", "inf", "too large"),
        ("--num-gpus", "-1", "too small"),
        ("--gpus-per-worker", "0", "too small"),
        ("--workers-per-gpu", "100000", "model of its own"),
        ("--max-attempts", "1000000", "takes a worker down"),
        ("--stall-timeout", "nan", "NaN is not a number"),
        ("--stall-timeout", "1e300", "a year"),
        ("--flush-every", "inf", "a year"),
        ("--grace", "-inf", "too small"),
        ("--max-samples", "1000000000000", "rows"),
        ("--max-failures", "9" * 5000, "neither a number"),
        ("--max-failures", "1e3%", "neither a number"),
        ("--max-failures", "101%", "neither a number"),
    ],
)
def test_an_option_out_of_bounds_is_refused_with_its_reason(option: str, value: str, reason: str) -> None:
    found = called("run", "--config", "none.json", option, value)
    assert found.exit_code == 2
    assert option in found.output
    assert reason in found.output
    assert len(found.output) < 500


def test_budgets_that_multiply_into_too_many_runs_are_refused_at_once(tmp_path: Path) -> None:
    many = [0.001 * (place + 1) for place in range(900)]
    block = {
        "ks": [3],
        "shap_fractions": many,
        "first_layer_fractions": many,
        "importance_min_fractions": many,
    }
    path = written(
        tmp_path, {**USUAL, "experiments": [{"explainer_type": "hierarchical", "hierarchical": block}]}
    )
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert f"729,000,000 runs are too many: at most {MOST_RUNS:,}" in found.output


RESERVED = [
    ".hidden",
    ".lock",
    ".tmp-1",
    "spec.json",
    "Spec.JSON",
    "samples",
    "checkpoint.json",
    "config.json",
    "pace.json",
    "progress.json",
    "report.html",
    "generations",
    "wandb",
    "mlflow",
    "set_aside_20260101T000000Z",
]


@pytest.mark.parametrize("name", RESERVED)
def test_a_variant_named_like_something_in_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, {**USUAL, "experiments": [{"explainer_type": "exact", "name": name}]})
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert "experiments[0].name" in found.output
    assert name in found.output
    assert "another name" in found.output


def test_the_name_of_a_run_that_is_made_from_its_budgets_is_checked_too(tmp_path: Path) -> None:
    """`.x` makes `.x_limited_mc_ns8`, a hidden folder; 150 letters and the budgets make too long a name."""
    hidden = {"explainer_type": "mc", "num_samples": [8], "name": ".x"}
    block = {
        "ks": [3],
        "importance_min_fractions": [0.12345678901234567],
        "shap_fractions": [0.12345678901234567],
    }
    long = {"explainer_type": "hierarchical", "hierarchical": block, "name": "x" * 150}
    path = written(tmp_path, {**USUAL, "experiments": [hidden, long]})
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert "begins with a dot" in found.output
    assert "characters long" in found.output


@pytest.mark.parametrize("name", ["spec", "samples2", "a.json", "audio", "summary", "Exact"])
def test_names_that_collide_with_nothing_are_taken(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, {**USUAL, "experiments": [{"explainer_type": "exact", "name": name}]})
    assert [run.name for run in expand(load_config(path).experiment_set).runs] == [name]


@pytest.mark.parametrize("depth", [33, 500, 990, 5000])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for text in (f'{{"experiments": {nested}}}', f'{{"a": {nested}}}', nested):
        with pytest.raises(ConfigError, match=r"nested too deeply|one JSON object"):
            load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("block", "place"),
    [
        ({"chat": {"system_prompt": "a \ud800 b"}}, "chat.system_prompt"),
        ({"chat": {"chat_template_kwargs": {"\ud800": 1}}}, "chat.chat_template_kwargs.\ud800"),
        ({"zz\ud800": 1}, "zz\ud800"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_place(
    tmp_path: Path, block: dict[str, Any], place: str
) -> None:
    data = {**USUAL, "experiments": [{"explainer_type": "exact"}], **block}
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, data))
    assert [problem.path for problem in caught.value.problems] == [place]
    assert "surrogate" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\x7fELF\x02\x01\0\0", b"\xff\xfe{\0}\0", b"PAR1\0\0", b"\0" * 100, b"[1"]
)
def test_a_config_that_is_a_binary_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.json"
    path.write_bytes(content)
    found = called("validate", "--config", str(path))
    assert found.exit_code == 2
    assert "study.json" in found.output


def test_a_config_without_end_is_refused() -> None:
    found = called("validate", "--config", "/dev/zero")
    assert found.exit_code == 2
    assert "larger than 16 MB" in found.output
