# `make` alone lists what there is. Every target sets the checkout up first; that costs nothing the second time.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-audio demo-smollm2 test test-slow test-slurm chaos check clean

BIN := .venv/bin
SOURCES := src tests scripts benchmarks
# Handed on to pytest, such as ARGS="tests/demo -x".
ARGS ?=
# Processes that run tests; 0 for all in one, as a debugger wants it.
JOBS ?= 2

help:
	@echo "make setup   make .venv with Python 3.12 and the pinned packages (needs Python 3.8+; about 5 GB)"
	@echo "make demo    explain the demo's rows with four explainers on two workers, and show some"
	@echo "make demo-audio  the same with recordings: where is the sound that the answer names?"
	@echo "make demo-smollm2  questions to a real model of 135M parameters, explained exactly (fetches 93 MB)"
	@echo "make test    run the tests (ARGS=... goes to pytest, JOBS=0 runs them in one process)"
	@echo "make test-slow  run the slow tests: Ray clusters, kills, signals, real models"
	@echo "make test-slurm  run the tests that start a Slurm of their own (root; Debian's slurmctld, slurmd, munge)"
	@echo "make chaos   kill, signal and break a study at random and compare (ARGS=\"--kills 12 --seed 7\")"
	@echo "make check   lint, formatting and types"
	@echo "make clean   remove .venv, .tools and caches; results stay"

setup:
	@bash scripts/bootstrap.sh

demo: setup
	$(BIN)/mllm-shapx demo

demo-audio: setup
	$(BIN)/mllm-shapx demo --config configs/demo_audio.json
	$(BIN)/python scripts/check_planted_sound.py

demo-smollm2:
	@bash scripts/bootstrap.sh smollm2
	$(BIN)/python scripts/demo_smollm2.py

# One thread each: several processes with a thread per core stand in each other's way. A file's tests
# stay in one process, which makes its fixtures once.
test: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not slurm" $(ARGS)

# Ray clusters, lost nodes, kills and real models: what takes more than ten seconds each.
test-slow: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) -m "slow and not slurm" $(ARGS)

test-slurm: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 0 -m slurm tests/execution/test_slurm.py $(ARGS)

chaos: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python scripts/chaos.py $(ARGS)

check: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
