# make run | test | test-faults | check | bench | gpu | demo-train | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
# On all cores, where pip compiles on one; a file that does not compile is one that nothing imports.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

# What `make test` runs: PYTEST="tests/unit/engine", or a file, or any other words of pytest's.
PYTEST ?= tests
# On both cores, a module in one process; what needs the cluster in one process of its own.
TESTS := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

.PHONY: run test test-faults check bench gpu demo-train clean

run: $(VENV)/.run  ## install, serve the embedded models, print what to try
	@$(BIN)/loraplex serve serve_config.yaml

test: $(VENV)/.dev  ## every promise but those that take long by nature
	@$(TESTS) -m "not slow" --ignore tests/faults $(PYTEST)

test-faults: $(VENV)/.dev  ## those: training, soaks, whole benchmarks; then nodes lost, overload, chaos
	@$(TESTS) -m "slow and not soak" --ignore tests/faults
	@$(BIN)/python -m pytest tests/faults

check: $(VENV)/.dev  ## format, lint, types, layers, configuration, known vulnerabilities
	@bash -n .ci/run
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright
	@$(BIN)/loraplex check serve_config.yaml
	@$(BIN)/python -m cluster.validate $(if $(CI),--strict)
	@$(BIN)/python -m tests.audit

bench: $(VENV)/.dev  ## what waiting and swaps cost on this machine
	@$(BIN)/python -m tests.bench_service
	@$(BIN)/python -m tests.bench_overhead
	@$(BIN)/loraplex bench swap --model tiny

# Needs no network and no virtual environment: WHEELS=folder installs wheels that were carried along, GPU="--part tests"
# runs a part.
gpu:  ## tests and benchmarks of a GPU against their bars; narrow without one
	@test -z "$(WHEELS)" || $(PYTHON) -m pip install -q --no-index --no-deps --upgrade --target build/gpu $(WHEELS)/*.whl
	@PYTHONPATH=.:build/gpu $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m serve_app.bench.machine.gpu_kit $(GPU)

demo-train: $(VENV)/.run  ## train the embedded models again, from nothing (half an hour on two quiet cores)
	@$(BIN)/python -m serve_app.demo.train

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP) -e '.[dev]'
	@$(COMPILE)
	@# Apart: beside a torch without CUDA, its wheel can only be imported by tests that know how.
	@$(PIP) --no-deps --upgrade --target build/vision torchvision
	@# Apart: diffusers loads it wherever it finds it, which takes every process of the tests another second to start.
	@$(PIP) --no-deps --upgrade --target build/torchao torchao
	@touch $@
