"""Numbers, nesting and kinds of file that no result has: `status`, `verify`, `report` and others read on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_study import Study

from mllm_shapx.cli import main

COMMANDS = ["status", "status --json", "failures", "verify", "verify --json", "report", "store info"]
NUMBERS = ["NaN", "Infinity", "1e400", "1e308", "-1", "1" + "0" * 400, '"7"', "null", "true", "[]", "1.5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("finished"), rows=3, words=4)
    study.write_prompts("tell our sailor", "", "about the harbor")
    assert study.call("--inline").code == 3
    return study


@pytest.fixture
def output(finished: Study, tmp_path: Path) -> Path:
    shutil.copytree(finished.output, tmp_path / "study")
    return tmp_path / "study"


def called(command: str, output: Path) -> Result:
    found = CliRunner().invoke(main, [*command.split(), str(output)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert "unexpected" not in found.output, found.output
    assert "Traceback" not in found.output, found.output
    allowed = {0, 1} if command.startswith("verify") else {0}
    assert found.exit_code in allowed, found.output
    return found


FILES = {
    "checkpoint": ("exact/checkpoint.json", ["updated_at", "created_at", "next_index", "version"]),
    "spec": ("exact/spec.json", ["rows_total", "selected_rows", "result_settings", "explainer_type"]),
    "summary": (
        "exact/summary/aggregate_metrics.json",
        ["n_samples", "n_calls_total", "model_calls_total", "runtime_sec_avg", "avg_frac_text"],
    ),
    "sample": (
        "exact/samples/sample_00000_result.json",
        ["row_index", "runtime_sec", "n_calls", "base_value", "grand_value", "values_sum", "num_players"],
    ),
    "failure": ("exact/failures/sample_00001.json", ["row_index", "attempts", "at"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_number_that_is_none_is_read_as_damage(output: Path, kind: str) -> None:
    name, keys = FILES[kind]
    path = output / name
    whole = path.read_text()
    data = json.loads(whole)
    for key in keys:
        for number in NUMBERS:
            text = json.dumps({**data, key: "PLACE"}).replace('"PLACE"', number)
            path.write_text(text)
            for command in COMMANDS:
                called(command, output)


def test_values_that_overflow_when_summed_are_damage(output: Path) -> None:
    path = output / FILES["sample"][0]
    data = json.loads(path.read_text())
    for entry in data["conversation"][1]:
        entry["shap_values"] = [1e308] * len(entry["content"])
    path.write_text(json.dumps(data))
    for command in COMMANDS:
        called(command, output)
    found = called("verify", output)
    assert found.exit_code == 1
    assert "shap_values" in found.output


@pytest.mark.parametrize("depth", [70, 500, 950, 100_000])
@pytest.mark.parametrize("kind", FILES)
def test_deep_nesting_is_damage(output: Path, kind: str, depth: int) -> None:
    path = output / FILES[kind][0]
    text = path.read_text()
    path.write_text(text.replace("{", '{"deep": ' + "[" * depth + "]" * depth + ",", 1))
    for command in COMMANDS:
        called(command, output)
    assert called("verify", output).exit_code == 1


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("put", [pipe, device, loop, folder])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_is_damage(output: Path, kind: str, put: Callable[[Path], None]) -> None:
    path = output / FILES[kind][0]
    path.unlink()
    put(path)
    for command in COMMANDS:
        called(command, output)
    assert called("verify", output).exit_code == 1


def test_a_resume_mends_what_is_no_file(finished: Study, output: Path) -> None:
    for kind, put in zip(FILES, [pipe, device, loop, folder, pipe], strict=True):
        path = output / FILES[kind][0]
        path.unlink()
        put(path)
    rows = {"source": "local_parquet", "path": str(finished.folder / "rows.parquet")}
    study = Study(output.parent, settings={"output_root": str(output.parent), "dataset": rows})
    assert study.call("--inline", "--resume").code == 3
    assert called("verify", output).exit_code == 0


@pytest.mark.parametrize("name", ["exact/samples", "exact/failures", "exact/summary", "generations"])
@pytest.mark.parametrize("put", [pipe, loop])
def test_a_file_where_a_folder_belongs_is_told(output: Path, name: str, put: Callable[[Path], None]) -> None:
    path = output / name
    shutil.rmtree(path)
    put(path)
    for command in COMMANDS:
        found: Any = CliRunner().invoke(main, [*command.split(), str(output)])
        assert found.exit_code in {0, 1, 2}, found.output
        assert found.exit_code != 1 or "problem(s)" in found.output or '"problems"' in found.output
        assert "unexpected" not in found.output, found.output
        assert found.exit_code != 2 or name in found.output


def test_the_lock_and_the_pace_may_hold_anything(output: Path) -> None:
    for name in (".lock", "pace.json", "progress.json"):
        for content in (
            "[]",
            "{}",
            '{"pid": 1e400}',
            '{"workers": -1e308, "seconds_per_answer": {"a": {"x": NaN}}}',
        ):
            (output / name).write_text(content)
            for command in COMMANDS:
                called(command, output)
    lock = {"token": "t", "host": "h", "boot_id": "b", "pid": 10**30, "process_started_at": 1e308}
    (output / ".lock").write_text(json.dumps({**lock, "started_at": -1e308, "heartbeat": 1e308}))
    for command in COMMANDS:
        called(command, output)
