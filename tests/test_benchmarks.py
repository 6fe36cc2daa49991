"""Every benchmark runs at its smallest size and prints its figure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
    "bench_coordinator.py": ("--units 40", r"^ +40 +\d+"),
    "bench_engine.py": ("--players 3 --new-tokens 2 --seconds 1", r"own runner +[\d,.]+ .* \d+\.\d+x"),
    "bench_grid.py": ("--rows 2 --players 3 --tokens 2 --rounds 1", r'"grid_over_exact": \d'),
    "bench_hierarchical.py": ("--games 1", r"hierarchical needs \d"),
    "bench_likelihood.py": ("--players 3 --tokens 2 --rounds 1", r"tf_logprob: .* times generate"),
    "bench_liquid.py": (
        "--size tiny --output text --new-tokens 2 --seconds 1 --windows 2 --batch-sizes 2 --own 1 --rounds 1",
        r"equal answers: 1 of 1",
    ),
    "bench_many_workers.py": (
        "--workers 2 --seconds 0.1 --rows 4 --players 3 --batch-size 4",
        r"efficiency \d\.\d+ of the bound",
    ),
    "bench_overhead.py": ("--players 5", r"32 coalitions: [\d,]+ us each"),
    "bench_spreading.py": ("--case row --seconds 0.02 --workers 1 --rounds 1", r"^ +row +1 +1 "),
    "bench_start.py": ("--rounds 1", r"first sample"),
    "house.py": ("", r"lines in \d+ modules"),
}
"""Script -> options of a small run, and what it prints."""
ELSEWHERE = {
    "made_up.py": "imported by others",
    "bench_report.py": "tests/reporting/test_bench_report.py",
    "bench_estimates.py": "takes minutes",
}
"""Script -> where it is tested, or why it is not."""


def test_every_script_is_named() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} == {*SMALLEST, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLEST)
def test_it_prints_its_figure(script: str) -> None:
    options, figure = SMALLEST[script]
    call = [sys.executable, str(BENCHMARKS / script), *options.split()]
    root = BENCHMARKS.parent
    done = subprocess.run(call, capture_output=True, text=True, cwd=root, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(figure, done.stdout, re.MULTILINE), done.stdout
