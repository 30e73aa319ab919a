# Two commands do everything, on a machine with Python 3.10 or newer, make and a package index:
#   make demo    environment, package, and the main job on the embedded pipelines
#   make test    environment, linters, the whole test suite, documentation
#
# Override as needed: PYTHON=python3.12, VENV=.venv312, TORCH="torch==2.9.0", WORKERS=8, PYTEST_ARGS="-k table"

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One torch thread a process: the workers share the cores, and results do not depend on the number of threads.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))
	@echo "Also: make lint, make bench, make docs, make clean."

# --------------------------------------------------------------------------------------- environment (stamp files)
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"diffaccel needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# torch first, so that the version is this one and not whatever the other packages would pull in
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	$(PIP) install -q '$(TORCH)'
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch pyproject.toml
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	$(PIP) install -q -e '.[test,eval]'
	@touch $@ $(VENV)/.stamp-package

# ------------------------------------------------------------------------------------------------------- commands
demo: $(VENV)/.stamp-package
	$(BIN)/python -m diffaccel demo

test: lint
	HF_HUB_OFFLINE=1 $(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory docs

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every benchmark prints ratios that were measured within one run.
bench: $(VENV)/.stamp-test
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(ONE_THREAD) $(BIN)/python $$file; done

docs: $(VENV)/.stamp-test
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
