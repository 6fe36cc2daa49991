"""The commands `validate`, `plan` and `schema`, and how config files are named."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mllm_shapx.cli import main

HEAVY = ("torch", "ray", "datasets", "mllm_shap", "transformers", "wandb", "pandas")


def write(path: Path, **data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "experiment_set_id": path.stem,
        "connector": "hf_text",
        "generation": {"text_temperature": 0},
        "dataset": {"source": "local_csv", "path": str(path.parent / "rows.csv")},
        "experiments": [{"explainer_type": "exact"}, {"num_samples": [6]}],
        **data,
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text('prompt\nthe cat sat\na dog ran away fast\n"one, two"\n')
    return write(tmp_path / "study.json")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def call(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_validate_says_how_many_runs_a_good_config_has(study: Path) -> None:
    result = call("validate", "--config", study)
    assert result.exit_code == 0
    assert result.stdout == f"{study}: ok: study, 2 run(s)\n"


def test_validate_with_the_dataset_counts_the_rows(study: Path) -> None:
    assert "2 run(s), 3 row(s)" in call("validate", "--config", study, "--check-dataset").stdout


def test_a_wrong_config_exits_2_with_its_file_and_keys_and_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.json", experimnts=[], device="gpu")
    result = call("validate", "--config", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {path}: 2 problem(s)")
    assert 'did you mean "experiments"?' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_traceback_is_shown_to_those_who_ask_for_it(tmp_path: Path) -> None:
    result = call("validate", "--config", tmp_path / "gone.json", LOG_LEVEL="DEBUG")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "Traceback" not in call("validate", "--config", tmp_path / "gone.json", LOG_LEVEL="INFO").stderr


def test_the_problems_of_all_configs_are_shown(tmp_path: Path, study: Path) -> None:
    bad = [write(tmp_path / f"bad{number}.json", device="gpu") for number in (1, 2)]
    result = call("validate", "--config", bad[0], "--config", study, "--config", bad[1])
    assert result.exit_code == 2
    assert all(str(path) in result.stderr for path in bad)


def test_two_settings_of_one_run_name_are_refused_with_the_file(tmp_path: Path) -> None:
    twice = [{"explainer_type": "exact"}, {"explainer_type": "exact", "shap_override": {"mode": "STATIC"}}]
    path = write(tmp_path / "clash.json", experiments=twice)
    result = call("validate", "--config", path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: 1 problem(s)")
    assert "experiments[0]" in result.stderr


def test_a_dataset_that_is_not_there_is_refused_with_the_config_s_name(tmp_path: Path) -> None:
    path = write(tmp_path / "study.json")
    for command in (["validate", "--check-dataset"], ["plan"]):
        result = call(*command, "--config", path)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {path}: dataset.path")


def test_warnings_go_to_stderr_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.json", shap={"allow_mask_duplicates": True})
    result = call("plan", "--config", path, "--skip-data", "--json")
    assert result.stderr.startswith(f"warning: {path}: shap.allow_mask_duplicates")
    assert json.loads(result.stdout)["experiment_set_id"] == "odd"


def test_plan_prints_one_object_for_one_config(study: Path) -> None:
    data = json.loads(call("plan", "--config", study, "--json").stdout)
    assert data["experiment_set_id"] == "study"
    assert [(run["name"], run["explainer_type"]) for run in data["runs"]] == [
        ("exact", "exact"),
        ("limited_mc_ns6", "limited_mc"),
    ]
    assert {row["row_index"]: row["num_players"] for row in data["rows"]} == {0: 3, 1: 5, 2: 2}
    assert data["totals"]["model_calls"] == 8 + 32 + 4


def test_plan_prints_a_table_and_skips_the_dataset_when_told(study: Path) -> None:
    assert "3 row(s) of 2 to 5 players (median 3)" in call("plan", "--config", study).stdout
    (study.parent / "rows.csv").unlink()
    assert "rows not looked at" in call("plan", "--config", study, "--skip-data").stdout


def test_configs_are_named_by_options_globs_the_shell_s_globs_and_lists(tmp_path: Path) -> None:
    paths = [write(tmp_path / "many" / f"{name}.json") for name in "abc"]
    (tmp_path / "list.txt").write_text("# studies\n\nmany/c.json\nmany/b*.json\n")

    def named(*arguments: str | Path) -> list[str]:
        result = call("plan", "--skip-data", "--json", *arguments)
        data = json.loads(result.stdout)
        return [item["experiment_set_id"] for item in (data if isinstance(data, list) else [data])]

    assert named("--config", tmp_path / "many" / "*.json") == ["a", "b", "c"]
    assert named("--config", *paths) == ["a", "b", "c"]
    assert named("--config", paths[1], "--config", paths[0], "--config", paths[1]) == ["b", "a"]
    assert named("--config-list", tmp_path / "list.txt") == ["c", "b"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate"],
        ["validate", "--config", "nothing-*.json"],
        ["validate", "--config-list", "gone.txt"],
        ["plan", "--config", "a.json", "--jsn"],
        ["vallidate"],
    ],
)
def test_a_wrong_call_exits_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_two_configs_that_write_to_one_directory_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, experiment_set_id="same") for name in ("a.json", "b.json")]
    result = call("validate", "--config", *paths)
    assert result.exit_code == 2
    assert all(str(path) in result.stderr for path in paths)


def test_the_schema_is_printed_as_json() -> None:
    assert "experiments" in json.loads(call("schema").stdout)["properties"]


def test_validate_and_plan_import_nothing_heavy(study: Path) -> None:
    for arguments, allowed in (
        (["validate", "--config", str(study)], ()),
        (["plan", "--skip-data", "--config", str(study)], ()),
        (["plan", "--config", str(study)], ("pandas",)),
    ):
        code = f"""
import sys
from mllm_shapx.cli import main
main({arguments!r}, standalone_mode=False)
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
        done = python(code)
        assert done.returncode == 0, done.stderr
        loaded = done.stdout.splitlines()[-1]
        assert all(f"'{name}'" not in loaded for name in HEAVY if name not in allowed), loaded


def test_the_module_can_be_run_and_ends_with_the_error_s_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mllm_shapx.cli", "validate", "--config", str(tmp_path / "gone.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no file" in done.stderr
    assert "Traceback" not in done.stderr


def test_mllm_shap_is_imported_from_the_folder_that_the_environment_names(
    tmp_path: Path, study: Path
) -> None:
    source = tmp_path / "checkout"
    (source / "mllm_shap").mkdir(parents=True)
    (source / "mllm_shap" / "__init__.py").write_text("HERE = True\n")
    code = f"""
import sys
from mllm_shapx.cli import main
main(["validate", "--config", {str(study)!r}], standalone_mode=False)
assert sys.path[0] == {str(source)!r}
import mllm_shap
assert mllm_shap.HERE
"""
    done = python(code, MLLM_SHAP_SRC=str(source))
    assert done.returncode == 0, done.stderr


def test_an_environment_that_makes_no_sense_is_refused(tmp_path: Path, study: Path) -> None:
    gone = call("validate", "--config", study, MLLM_SHAP_SRC=str(tmp_path / "gone"))
    assert (gone.exit_code, "MLLM_SHAP_SRC" in gone.stderr) == (2, True)
    loud = call("validate", "--config", study, LOG_LEVEL="LOUD")
    assert (loud.exit_code, "LOG_LEVEL" in loud.stderr) == (2, True)
