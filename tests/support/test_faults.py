"""Tests of the broken disk and the wrong clock that other tests use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import BadDisk, has_compiler, wrong_clock

WRITE = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
try:
    os.write(file, b"x")
    os.fsync(file)
except OSError as error:
    print(error.strerror)
"""


def run(code: str, *args: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(not has_compiler(), reason="needs a C compiler")
def test_a_bad_disk_fails_on_demand_and_only_below_its_folder(tmp_path: Path) -> None:
    """Writes or flushes in the folder fail with the system's own error; others succeed."""
    output = tmp_path / "output"
    output.mkdir()
    disk = BadDisk(tmp_path, output)
    disk.fail("w")
    assert run(WRITE, str(output / "a"), env=disk.env) == "No space left on device"
    assert run(WRITE, str(tmp_path / "b"), env=disk.env) == ""
    disk.fail("f")
    assert run(WRITE, str(output / "a"), env=disk.env) == "Input/output error"
    disk.mend()
    assert run(WRITE, str(output / "a"), env=disk.env) == ""


@pytest.mark.skipif(not has_compiler(), reason="needs a C compiler")
def test_a_wrong_clock_is_wrong_by_its_seconds(tmp_path: Path) -> None:
    """The wall clock is set back by two hours; sleeping and the monotonic clock are unchanged."""
    env = wrong_clock(tmp_path, -7200)
    now = "import time; time.sleep(0.01); print(time.time(), time.monotonic())"
    right, wrong = (list(map(float, run(now, env=each).split())) for each in ({}, env))
    assert 7150 < right[0] - wrong[0] < 7250
    assert abs(right[1] - wrong[1]) < 50
