"""What cannot be explained, takes very long or cannot be exact is said before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mllm_shapx.cli import main
from mllm_shapx.config.models import ExperimentSet
from mllm_shapx.planning.precision import loaded_warnings, rounding_warnings
from mllm_shapx.planning.sweep import expand
from mllm_shapx.records.pace import Pace, write_pace
from mllm_shapx.records.storage import LocalStorage

MODEL = Path(__file__).parents[2] / "demo" / "model"
EXACT = {"explainer_type": "exact"}
SAMPLING = {"num_samples": [50]}


def words(count: int) -> str:
    return " ".join(f"w{place}" for place in range(count))


def study(folder: Path, *counts: int, experiments: list[dict[str, Any]], **settings: Any) -> Path:
    (folder / "rows.csv").write_text("\n".join(["prompt", *map(words, counts)]) + "\n")
    path = folder / "study.json"
    content = {
        "experiment_set_id": "study",
        "output_root": str(folder / "out"),
        "connector": "hf_text",
        "connector_kwargs": {"model_id": str(MODEL), "dtype": "float32"},
        "dataset": {"source": "local_csv", "path": str(folder / "rows.csv")},
        "selection": {"shuffle_seed": None},
        "generation": {"text_temperature": 0, "max_new_tokens": 2},
        "wandb": {"enabled": False},
        "experiments": experiments,
        **settings,
    }
    path.write_text(json.dumps(content))
    return path


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_run_that_can_explain_no_row_is_an_error_of_the_config(tmp_path: Path) -> None:
    config = study(tmp_path, 25, 30, experiments=[EXACT, SAMPLING])
    result = call("validate", "--config", config, "--check-dataset")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {config}: no row can be explained by exact: 2 row(s) of 2")
    assert "selection.max_prompt_tokens to 24 or less" in result.stderr
    assert call("validate", "--config", config).exit_code == 0, "without the dataset nothing is known"


def test_rows_that_a_run_cannot_explain_are_a_warning_with_their_number(tmp_path: Path) -> None:
    config = study(tmp_path, 25, 4, 3, experiments=[EXACT, SAMPLING])
    result = call("validate", "--config", config, "--check-dataset")
    assert result.exit_code == 0
    assert "exact: 1 row(s) of 3 have more than 24 players and will fail" in result.stderr
    planned = json.loads(call("plan", "--config", config, "--json").stdout)
    assert planned["totals"]["refused_samples"] == 1
    assert planned["runs"][0]["refused_samples"] == 1
    assert planned["notes"][0].startswith("exact: 1 row(s) of 3 have more than 24 players")


def test_the_run_says_it_at_its_start_and_refuses_when_nothing_could_come_out(tmp_path: Path) -> None:
    config = study(tmp_path, 25, experiments=[EXACT, SAMPLING])
    result = call("run", "--config", config, "--inline")
    assert result.exit_code == 3
    assert "warning: exact: 1 row(s) of 1 have more than 24 players" in result.stderr
    (tmp_path / "alone").mkdir()
    config = study(tmp_path / "alone", 25, experiments=[EXACT])
    refused = call("run", "--config", config, "--inline")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: {config}: no row can be explained by exact")
    assert not (tmp_path / "alone" / "out").exists()


def test_rows_without_a_player_are_told_and_not_counted(tmp_path: Path) -> None:
    config = study(tmp_path, 3, experiments=[EXACT, SAMPLING])
    (tmp_path / "rows.csv").write_text("prompt\none two\n— … 。\n")
    result = call("validate", "--config", config, "--check-dataset")
    assert result.exit_code == 0
    assert "1 row(s) of 2 have nothing that could be a player and will fail" in result.stderr
    planned = json.loads(call("plan", "--config", config, "--json").stdout)
    assert [(run["refused_samples"], run["coalitions"]) for run in planned["runs"]] == [(1, 4), (1, 4)]
    note, _ = planned["notes"]
    assert note.startswith("1 row(s) of 2 have nothing that could be a player and will fail; selection.min")
    (tmp_path / "rows.csv").write_text("prompt\n?\n— … 。\n")
    for command in (["validate", "--check-dataset"], ["run", "--inline"]):
        refused = call(*command, "--config", config)
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"error: {config}: no row can be explained: 2 row(s) of 2 have no")


def test_games_of_twenty_players_are_told_with_their_answers_and_a_time(tmp_path: Path) -> None:
    config = study(tmp_path, 20, 21, 19, experiments=[EXACT, SAMPLING, {"fractions": [0.5]}])
    result = call("validate", "--config", config, "--check-dataset")
    assert result.exit_code == 0
    assert "exact and 1 more run(s): 2 row(s) of 3 have games of 2^20 = 1,048,576 coalitions or more" in (
        result.stderr
    )
    assert "they take 3,145,728 answers, 8h 44m at 100 a second" in result.stderr
    assert "3,145,728 answers" in call("plan", "--config", config).stdout
    small = study(tmp_path, 19, experiments=[EXACT])
    assert call("validate", "--config", small, "--check-dataset").stderr == ""


def test_the_time_is_the_measured_one_where_there_is_one(tmp_path: Path) -> None:
    config = study(tmp_path, 20, experiments=[EXACT])
    (run,) = expand(ExperimentSet.model_validate(json.loads(config.read_text()))).runs
    folder = tmp_path / "out" / "study"
    folder.mkdir(parents=True)
    write_pace(LocalStorage(folder), Pace(2, {run.cost_key: 0.002}))
    result = call("validate", "--config", config, "--check-dataset")
    assert "about 17m 29s on 2 workers at the pace measured here" in result.stderr


def test_rows_without_spaces_are_told_by_validate_and_plan(tmp_path: Path) -> None:
    config = study(tmp_path, 3, experiments=[EXACT])
    (tmp_path / "rows.csv").write_text("prompt\n今天天气怎么样我们去公园吧\none two\n", encoding="utf-8")
    for command in (["validate", "--check-dataset"], ["plan"]):
        result = call(*command, "--config", config)
        assert result.exit_code == 0
        assert result.stderr.count("1 of 2 row(s) are in a script that puts no spaces") == 1


@pytest.mark.parametrize(
    ("dtype", "device", "explainer", "warned"),
    [
        ("bfloat16", None, EXACT, True),
        ("float16", "cpu", EXACT, True),
        ("auto", "cuda", EXACT, True),
        ("auto", None, EXACT, False),
        ("auto", "cpu", EXACT, False),
        ("float32", "cuda", EXACT, False),
        ("bfloat16", None, SAMPLING, False),
    ],
)
def test_exact_values_in_a_dtype_that_rounds_are_warned_of_once(
    tmp_path: Path, dtype: str, device: str | None, explainer: dict[str, Any], warned: bool
) -> None:
    kwargs = {"model_id": str(MODEL), "dtype": dtype}
    other = {**explainer, "name": "other"}
    config = study(tmp_path, 3, experiments=[explainer, other], connector_kwargs=kwargs, device=device)
    for command in (["validate"], ["plan", "--skip-data"]):
        text = call(*command, "--config", config).stderr
        assert text.count("connector_kwargs.dtype") == warned
        assert ("float32" in text and "verify --again" in text) == warned


def test_auto_that_turns_out_to_round_is_told_when_it_is_known() -> None:
    settings = {"experiment_set_id": "study", "experiments": [EXACT], "connector_kwargs": {"dtype": "auto"}}
    runs = expand(ExperimentSet.model_validate(settings)).runs
    assert rounding_warnings(runs) == []
    assert loaded_warnings(runs, "float32") == []
    (warning,) = loaded_warnings(runs, "bfloat16")
    assert '"auto", which is bfloat16 here' in warning
    on_cuda = expand(ExperimentSet.model_validate({**settings, "device": "cuda"})).runs
    assert loaded_warnings(on_cuda, "bfloat16") == [], "it was told before"
