# Every target does its own set-up from a fresh clone, and is quick the second time.
#
# The pinned versions stand in constraints.txt. torch comes first and alone: its builds for one version differ by
# platform (CPU, CUDA), and pip takes whichever your configured index offers.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
PYTEST := $(BIN)/pytest -n 2 --dist worksteal
FAST := -m "not slow and not gpu"

.PHONY: demo test test-all lint types matrix docs docs-site shares bench bench-quick gpu audit sbom lock clean mutants
.DELETE_ON_ERROR:

demo: .venv/.run
	@$(BIN)/luthier demo
	@echo; echo "luthier is $(BIN)/luthier here; source $(BIN)/activate puts it on your path."

test: .venv/.dev .venv/.samples lint types
	$(PYTEST) $(FAST)

test-all: .venv/.dev .venv/.samples lint types
	$(PYTEST) -m "not gpu" --matrix docs/support-matrix.md

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

matrix: .venv/.dev
	$(BIN)/python scripts/matrix.py
	LUTHIER_WRITE_PAGES=1 $(PYTEST) tests/surgery/test_stored_bases.py -k support_matrix

docs: .venv/.dev shares
	$(BIN)/luthier methods --pages docs/methods

# The site: build/site/index.html. The build itself needs no network, and its pages load nothing from elsewhere.
docs-site: .venv/.docs
	$(BIN)/mkdocs build --strict

shares: .venv/.dev
	$(BIN)/luthier methods --refresh

bench: .venv/.dev .venv/.samples
	$(BIN)/python -m benchmarks

bench-quick: .venv/.dev .venv/.samples
	$(BIN)/python -m benchmarks --quick

# Installs nothing: a machine with a GPU may have no network. Without .venv it takes the python3 that is there.
# TINY=1 runs all of it at tiny sizes, on a CPU too.
gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(if $(TINY),--tiny) $(if $(GPU_OUT),--out $(GPU_OUT))

# Not for CI: about an hour. ARGS="--only training/schedule.py" for a part; --help says the rest.
mutants: .venv/.dev
	$(BIN)/python scripts/mutants.py $(ARGS)

# Needs the network; without it, or where the index does not know a package, it fails and says what was not audited.
audit: .venv/.dev
	$(BIN)/python scripts/audit.py

# Needs no network.
sbom: .venv/.dev
	$(BIN)/python scripts/sbom.py

lock: .venv/.dev
	$(BIN)/python scripts/lock.py

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache

# --- set-up: a stamp file for each stage, made anew when what it depends on has changed

.venv/.made:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "luthier needs Python 3.11 or later"'
	$(PYTHON) -m venv .venv
	touch $@

.venv/.torch: .venv/.made constraints.txt
	$(PIP) install -q -c constraints.txt torch
	touch $@

.venv/.run: .venv/.torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[metrics]"
	touch $@

# LOCKED=1 takes every archive by its digest (requirements.lock, one platform); torch has been pinned by version.
.venv/.dev: .venv/.run
ifdef LOCKED
	$(PIP) install -q --require-hashes --no-deps -r requirements.lock
	$(PIP) install -q --no-deps -e .
else
	$(PIP) install -q -c constraints.txt -e ".[dev]"
endif
	touch $@

.venv/.docs: .venv/.run
	$(PIP) install -q -c constraints.txt -e ".[metrics,docs]"
	touch $@

.venv/.samples: .venv/.dev
	$(BIN)/luthier samples fetch minilm-l6 trec6 smollm2-135m
	touch $@
