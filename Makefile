# make demo, make test: on a machine with python3.11, make, gcc and a package index, nothing else is needed.
#
# PYTHON      the interpreter that .venv is made with
# TORCH_FLAGS extra flags of the pip call that installs torch, for example for the CPU build:
#             make demo TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
# ARGS        passed on to the command of `make demo` and `make test`
# JOBS        test processes

PYTHON ?= python3.11
VENV ?= .venv
TORCH_FLAGS ?=
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
REQUIREMENTS := $(wildcard requirements/*.txt)
# What the editable install depends on: a new package folder or a changed native source needs another one.
SOURCES := pyproject.toml setup.py $(shell find kvpress policies kernels longbench \
	-name __init__.py -o -name '*.cpp' -o -name '*.hpp' 2>/dev/null)

.PHONY: help venv demo test coverage mutation lint links types format docs site clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(VENV)/installed ## make .venv with the pinned requirements and this package

$(VENV)/requirements: $(REQUIREMENTS)
	@echo "Installing the requirements into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH_FLAGS) -r requirements/torch.txt
	@$(PIP) install -r requirements/dev.txt -r requirements/docs.txt
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install -r requirements/triton.txt
	@touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: venv ## the pass key with every policy; ARGS=--quick for the short one
	@$(BIN)/kvpress demo $(ARGS)

test: venv ## all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

coverage: venv ## all tests, and the lines of kvpress/ and policies/ that none of them runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term-missing:skip-covered $(ARGS)

mutation: venv ## small mistakes in the slot table, budgets and masks, one at a time: the tests must notice each
	@$(PIP) install -r requirements/mutation.txt
	@$(BIN)/python benchmarks/mutation.py $(ARGS)

lint: venv ## ruff: rules and layout
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

# Tools that read source files do not know that four folders make one package: they read it through a folder of links.
links:
	@rm -rf .typecheck && mkdir -p .typecheck/kvpress
	@ln -s $(CURDIR)/kvpress/* $(CURDIR)/policies $(CURDIR)/kernels $(CURDIR)/longbench .typecheck/kvpress/

types: venv links ## mypy --strict
	@cd .typecheck && $(abspath $(BIN))/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p kvpress

format: venv ## let ruff rewrite
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

docs: venv ## write the generated tables of the README
	@$(BIN)/python docs/generate.py

site: venv links ## the documentation, into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --site-dir build/site

clean: ## remove .venv and everything built; the model stays in the user's cache folder
	rm -rf $(VENV) .typecheck build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
