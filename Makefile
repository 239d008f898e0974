# make run and make test each do all of their own set-up (tools/setup.py), once. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_FLAGS ?= -q
BENCH_FLAGS ?= --ranks 4 --hosts 2 --device cpu --baseline gloo
GPU_BENCH_FLAGS ?= --tokens 8,128 --dtype fp8,bf16
GPU_PREFILL_FLAGS ?= --layout contiguous --tokens 4096,8192 --routing uniform,zipf,k-hot,zipf-packed --num-sms 16,24 \
	--json bench/results/gpu_skew.json

.DEFAULT_GOAL := help
.PHONY: help setup run test test-gpu test-sglang lint types format bench bench-gpu doctor clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## make .venv, with the CPU builds of torch and of the Transfer Engine, and the system libraries
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH: install Python 3.10 to 3.13 (apt-get install python3)." >&2; exit 1; }
	@$(PYTHON) tools/setup.py

run: setup  ## a DeepSeek-V3 model on 4 CPU ranks as 2 hosts, then dispatch and combine against gloo
	@$(BIN)/python examples/run.py

test: lint types  ## ruff, mypy --strict, pytest: two files at a time, then what needs the machine to itself
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not alone" -n 2 --dist loadfile
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) -m alone

test-gpu:  ## the tests that need CUDA GPUs, with $(PYTHON) and the CUDA build of torch that it has
	@PYTHONPATH=. $(PYTHON) -m pytest $(PYTEST_FLAGS) tests/gpu

test-sglang:  ## the SGLang plug-in against the sources of three releases; SGLANG_VERSIONS=0.5.20 chooses
	@PYTEST_FLAGS="$(PYTEST_FLAGS)" $(PYTHON) tools/sglang_tests.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

format: setup  ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup  ## moe-a2a bench on CPU ranks; BENCH_FLAGS="..." replaces the arguments
	@$(BIN)/moe-a2a bench $(BENCH_FLAGS)

bench-gpu:  ## moe-a2a bench on all GPUs of this machine, with $(PYTHON): GPU_BENCH_FLAGS="...", then GPU_PREFILL_FLAGS="..."
	@PYTHONPATH=. $(PYTHON) -m moe_a2a.cli bench --device cuda $(GPU_BENCH_FLAGS)
	@PYTHONPATH=. $(PYTHON) -m moe_a2a.cli bench --device cuda $(GPU_PREFILL_FLAGS)

doctor: setup  ## what this machine can do, and what is missing
	@$(BIN)/moe-a2a doctor

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) .venv-sglang build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
