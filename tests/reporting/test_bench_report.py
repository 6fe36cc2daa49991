"""The benchmark of the report runs, on a small study, and finds the page within its bounds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import in_browser

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_report.py"


@in_browser
@pytest.mark.slow
def test_a_small_study_is_measured(tmp_path: Path) -> None:
    call = [sys.executable, str(SCRIPT), "--rows", "200", "--runs", "2", "--players", "6"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"200 rows x 2 runs: \d\.\d MB, written in", done.stdout)
    measured = dict(re.findall(r"^(\S.*?) +(\d+\.\d) ms$", done.stdout, re.MULTILINE))
    assert {"text", "answers", "language", "run", "order", "side by side"} <= measured.keys()
    assert all(float(milliseconds) > 0.0 for milliseconds in measured.values())
