# PYTHON=python3.12 make test     another interpreter
# make test T=data                one stage's tests
PYTHON ?= python3
T ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TESTS := tests$(if $(T),/$(T))
# Threads that spin while they wait make a busy machine many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test check docs bench gpu clean

help:
	@echo "make demo    raw records to verdict and report, on bundled data, on a CPU"
	@echo "make test    set up and run the tests (T=data: one stage's)"
	@echo "make check   format, lint, types, generated docs, tests: what a change needs"
	@echo "make docs    write docs/cli.md, docs/recipe.md and the README's demo block anew"
	@echo "make bench   run benchmarks/bench_*.py; results go to benchmarks/results/"
	@echo "make gpu     the tests that need a CUDA device"
	@echo "make clean   remove .venv and caches; runs/ stays"

demo: .venv/default
	$(BIN)/metier demo

test: .venv/dev
	$(BIN)/python -m pytest -n auto $(TESTS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_docs.py --check
	$(BIN)/python -m pytest -n auto

docs: .venv/dev
	$(BIN)/python scripts/generate_docs.py

bench: .venv/dev
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python "$$script"; done

gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# A stamp is the last thing that its recipe writes, so a broken-off set-up starts again.
.venv/default: pyproject.toml constraints.txt
	@echo "setting up .venv: about a minute, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) -e .
	@touch $@

.venv/dev: .venv/default
	@$(INSTALL) -e '.[dev]'
	@touch $@
