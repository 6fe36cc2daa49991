"""What a reading command writes never takes the place of a study's files."""

import hashlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from results_on_disk import write_study

from mllm_shapx.cli import main

IN_A_STUDY = [
    "study/exact/spec.json",
    "study/exact/samples/sample_00000_result.json",
    "study/exact/samples/report.html",
    "study/new.html",
    "study/exact",
    "other/limited_mc/checkpoint.json",
    "other/pace.json",
    "link/exact/spec.json",
]
COMMANDS = {
    "report": ["report", "study", "--output"],
    "report of a run": ["report", "study/exact", "--output"],
    "figures": ["report", "study", "--figures"],
    "export": ["export", "study", "--format", "csv", "--overwrite", "--output"],
    "compare": ["compare", "study", "--html"],
}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two studies beside each other, and a link to one; commands are called from the folder of both."""
    for name in ("study", "other"):
        write_study(tmp_path / name, range(2), runs={"exact": 0.0, "limited_mc": 0.1})
    (tmp_path / "link").symlink_to(tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
@pytest.mark.parametrize("output", IN_A_STUDY)
def test_no_file_of_a_study_is_replaced(studies: Path, command: list[str], output: str) -> None:
    before = contents(studies)
    told = CliRunner().invoke(main, [*command, output])
    assert told.exit_code == 2, told.output
    assert "left as it is" in told.output or "is a folder" in told.output
    assert contents(studies) == before


@pytest.mark.parametrize("output", ["study/report.html", "study/exact/report.html", "page.html"])
def test_a_report_stands_beside_the_runs_in_one_or_elsewhere(studies: Path, output: str) -> None:
    before = contents(studies)
    for _ in range(2):
        told = CliRunner().invoke(main, ["report", "study", "--output", output])
        assert told.exit_code == 0, told.output
    after = contents(studies)
    assert after.pop(output)
    assert after == before


def test_a_run_without_its_spec_has_a_report_too(studies: Path) -> None:
    (studies / "study" / "exact" / "spec.json").unlink()
    told = CliRunner().invoke(main, ["report", "study/exact"])
    assert told.exit_code == 0, told.output
    assert (studies / "study" / "exact" / "report.html").is_file()


def test_a_folder_called_samples_is_nobody_s_study(studies: Path) -> None:
    (studies / "samples").mkdir()
    told = CliRunner().invoke(main, ["export", "study", "--format", "csv", "--output", "samples/table.csv"])
    assert told.exit_code == 0, told.output
