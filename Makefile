# Everything sets itself up: `make demo` and `make test` need only Python 3.10 or newer and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DEMO_DIR := remax-demo

.PHONY: help demo test test-slow lint audit format bench clean

help:
	@echo "make demo       the whole pipeline on a small world of stories, about two minutes on two cores"
	@echo "make test       all quick tests"
	@echo "make test-slow  the tests that take longer"
	@echo "make lint       ruff, mypy, the import contracts and a scan for secrets"
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

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files --cached --others --exclude-standard -z > $(VENV)/.files
	xargs -0 $(BIN)/detect-secrets-hook --no-verify --baseline .ci/secrets.baseline < $(VENV)/.files

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
