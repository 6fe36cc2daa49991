"""The command line: parse, call, print. `mllm-shapx` is `python -m mllm_shapx`."""

from mllm_shapx.cli import preparing, reading, running, slurm
from mllm_shapx.cli.group import main
from mllm_shapx.cli.running import run

__all__ = ["main", "preparing", "reading", "run", "running", "slurm"]
