"""The script that trains the demo's model."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built_twice(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, int, str]]:
    """Run the script twice from nothing, with three steps: (folder, exit code, output) of each."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                ROOT / "scripts" / "train_demo_model.py",
                *("--steps", "3", "--batch-size", "4", "--checks", "4"),
                *("--out-model", folder / "demo" / "model", "--out-rows", folder / "demo" / "rows.parquet"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for folder in folders
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    codes = [process.returncode for process in processes]
    return list(zip(folders, codes, outputs, strict=True))


def test_two_runs_write_the_same_bytes(built_twice: list[tuple[Path, int, str]]) -> None:
    """The demo can be rebuilt: weights, tokenizer and rows come from the seed alone."""
    first, second = (folder / "demo" for folder, _, _ in built_twice)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert Path("model/model.safetensors") in names
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_rows_and_tokenizer_are_the_shipped_ones(built_twice: list[tuple[Path, int, str]]) -> None:
    """What lies in the repository is what the script writes; only the weights need the long training."""
    built = built_twice[0][0] / "demo"
    assert pq.read_table(built / "rows.parquet").equals(pq.read_table(ROOT / "demo" / "rows.parquet"))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        assert (built / "model" / name).read_text() == (ROOT / "demo" / "model" / name).read_text()


def test_model_that_learned_too_little_is_refused(built_twice: list[tuple[Path, int, str]]) -> None:
    """A failed training does not pass for a demo: exit code 1 and what to do."""
    _, code, output = built_twice[0]
    assert code == 1
    assert "rows, whole prompts: 0 of 24 answers right" in output
    assert "raise --steps" in output
