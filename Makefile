# `make demo` and `make test` work from a clean clone with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# The models here are small: one torch thread a process is fastest, and the tests share the cores.
JOBS ?= 2
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: demo test check bench evidence docs clean help

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on the path: install Python 3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: run make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## data in, a one-step generator out, in minutes
	$(BIN)/rectiflow demo

test: $(STAMP) ## the default test suite
	$(BIN)/python -m pytest -n $(JOBS)

check: $(STAMP) ## lint, format, types, layers and the documentation build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

bench: $(STAMP) ## side-by-side measurements against peers
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run.py

evidence: $(STAMP) ## run every built recipe and keep its result in results/
	@mkdir -p results
	@for slug in $$($(BIN)/rectiflow list --json | $(BIN)/python -c \
	  "import json, sys; print(*(r for s in json.load(sys.stdin) if s['built'] for r in s['recipes']))"); do \
	  $(BIN)/rectiflow run $$slug --out build/evidence/$$slug --overwrite; \
	  test $$? -le 1 || exit 2; \
	  cp build/evidence/$$slug/result.json results/$$slug.json; \
	done

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

clean: ## remove everything that can be made again
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
