"""The broken disk and the wrong clock that other tests use are what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import BadDisk, shifted_clock

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


@pytest.mark.skipif(not BadDisk.is_available(), reason="needs a C compiler")
def test_a_bad_disk_fails_on_demand_and_only_below_its_folder(tmp_path: Path) -> None:
    """Writes or flushes below the folder fail with the system's own error; others go through."""
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


@pytest.mark.skipif(shifted_clock(0) is None, reason="needs faketime")
def test_a_shifted_clock_is_wrong_by_its_hours() -> None:
    """The wall clock is set back by two hours."""
    env = shifted_clock(-2)
    assert env is not None
    now = "import time; print(time.time())"
    gap = float(run(now, env={})) - float(run(now, env=env))
    assert 7190 < gap < 7210
