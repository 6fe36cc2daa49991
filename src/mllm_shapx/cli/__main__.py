"""`python -m mllm_shapx.cli`: the command line without the signal handling of the first imports."""

from mllm_shapx.cli import main

main(prog_name="mllm-shapx")
