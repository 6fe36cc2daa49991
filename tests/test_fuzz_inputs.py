"""Some hundred random edits of valid inputs; `scripts/fuzz_inputs.py` makes as many as one likes."""

from pathlib import Path

import pytest
from fuzz_inputs import in_process, make_base

CHEAP = range(220)
RUNS = range(1000, 1012)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    folder.mkdir()
    make_base(folder)
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("LOG_LEVEL", "ERROR")


def test_looking_at_edited_inputs_ends_well(base: Path, tmp_path: Path) -> None:
    """No traceback, no escape, no hang; exit 0, 2 or 3, and 1 where `verify` finds something."""
    outcomes = in_process(base, tmp_path / "edited", 7, CHEAP, runs=0.0)
    assert [str(outcome.finding) for outcome in outcomes if outcome.finding is not None] == []
    assert {outcome.code for outcome in outcomes} == {0, 1, 2}


def test_running_edited_inputs_ends_well(base: Path, tmp_path: Path) -> None:
    outcomes = in_process(base, tmp_path / "edited", 7, RUNS, runs=1.0)
    assert [str(outcome.finding) for outcome in outcomes if outcome.finding is not None] == []
    assert {outcome.code for outcome in outcomes} <= {0, 2, 3}
