"""scripts/check_parity.py: it finds the demo's values equal to the library's, and sees a changed one."""

import json
from pathlib import Path

import pytest
from check_parity import main
from click.testing import CliRunner

from mllm_shapx.cli import main as command_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run one row of the demo in this process; return the config and the output directory."""
    folder = tmp_path_factory.mktemp("parity")
    config = json.loads((ROOT / "configs" / "demo.json").read_text())
    config["connector_kwargs"]["model_id"] = str(ROOT / "demo" / "model")
    config["dataset"]["path"] = str(ROOT / "demo" / "rows.parquet")
    config["output_root"] = str(folder)
    config["selection"] |= {"max_prompt_tokens": 6, "max_samples": 1}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(command_line, ["run", "--inline", "--config", str(path)])
    assert result.exit_code == 0, result.output
    return path, folder / "demo"


def parity(monkeypatch: pytest.MonkeyPatch, config: Path, directory: Path) -> int:
    monkeypatch.setattr("sys.argv", ["check_parity.py", str(directory), "--config", str(config)])
    return main()


def test_the_studys_values_are_the_librarys(
    study: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every run of a finished row agrees with mllm_shap's own runner; a value off by 1e-6 is found."""
    assert parity(monkeypatch, *study) == 0
    assert "4 sample(s) of 4 run(s)" in capsys.readouterr().out
    sample = next((study[1] / "exact" / "samples").iterdir())
    content = json.loads(sample.read_text())
    content["grand_value"] += 1e-6
    sample.write_text(json.dumps(content))
    assert parity(monkeypatch, *study) == 1
    said = capsys.readouterr().out
    assert "1e-06 (exact, row" in said
    assert "MORE THAN" in said


def test_a_missing_sample_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory without the samples ends with 2, the file's name and what to do."""
    assert parity(monkeypatch, ROOT / "configs" / "demo.json", tmp_path) == 2
    said = capsys.readouterr().err
    assert "_result.json is not there" in said
    assert "--resume" in said
