# hipexp: every target installs what it needs into .venv first; a second call is quick.
# pip is used as it is set up on the machine. Where it would fetch a large GPU build of torch for a CPU, point it at
# torch's CPU wheels with pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

PYTHON ?= python3
JOBS ?= 2
SIZE ?= full

# The version whose interpreter the kernels are tested in where torch brings none (GPU builds of torch demand one of their own).
TRITON := 3.6.0

# The ends of the window of transformers that hipexp takes; the environment has one between them.
TRANSFORMERS := 5.16.0 5.24.0

TUNED := task=infbench 'task.subtasks=[kv_retrieval]' task.length_tok=24576 'objective=[score,bytes]' max_bytes=3stage hours=0.65 held_out=20 checked=3 jobs=2 name=kv_4x

ALONE := task=latency task.geometry=llama31_8b task.dtype=float32 task.repeats=3

VENV := .venv
RUN := $(VENV)/bin/python
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
PIP := $(RUN) -m pip --disable-pip-version-check install --constraint constraints.txt --no-build-isolation

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-docs test-transformers test-slurm test-pythons dist models check pre-commit check-official results reproduced needle needle-table needle-1m tune methods ablation aot bench-cpu link-table gpu

help: ## this text
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(CORE) ## create .venv with what running needs

demo: $(CORE) ## dense against 3stage on the embedded model: a table and a picture (under 10 minutes on 2 cores)
	$(RUN) -m hipexp demo

test: $(DEV) ## the tests: no network, no GPU, under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not gpu" -n $(JOBS)

test-all: $(DEV) ## the tests and the slow rest, an hour at most
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not gpu" -n $(JOBS)

test-docs: $(DEV) ## every command of the tutorial, README and walks, the wheel in an empty folder, quick tables of the paper (some minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/docs tests/test_package.py tests/repro -m slow -n $(JOBS)

test-transformers: $(DEV) ## the tests of models on the oldest and the newest transformers that hipexp takes
	for version in $(TRANSFORMERS); do place=$(VENV)/transformers-$$version; \
	  test -d $$place || $(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target $$place transformers==$$version || exit 1; \
	  PYTHONPATH=$$place $(RUN) -c "import sys, transformers; sys.exit(transformers.__version__ != '$$version')" || exit 1; \
	  PYTHONPATH=$$place OMP_NUM_THREADS=1 $(RUN) -m pytest tests/hf -m "not slow and not gpu" -n $(JOBS) || exit 1; \
	done

test-pythons: ## a quick part of the tests on every Python from 3.11 on that this machine has (installs for each)
	JOBS=$(JOBS) tests/pythons.sh $(VENV)/pythons

dist: $(DEV) ## wheel and source archive, in dist/
	rm -rf build dist
	$(RUN) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(RUN) -m pip --disable-pip-version-check wheel --no-deps --no-build-isolation --wheel-dir dist .

test-slurm: $(DEV) ## a sweep on a real Slurm, with a preempted job (Debian, root; installs slurm; some 15 minutes)
	OMP_NUM_THREADS=1 tests/slurm/cluster.sh $(RUN) -m pytest tests/slurm

models: $(CORE) ## every family of models that fits, tried on small checkpoints of its real classes (some minutes)
	$(RUN) -m hipexp models

check: $(DEV) ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m mypy

pre-commit: $(DEV) ## what a commit is checked for, on all files; `.venv/bin/pre-commit install` has git do it
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pre_commit run --all-files

check-official: $(DEV) ## our scores and RULER rows beside the official code, fetched at fixed commits (needs a network; about 10 minutes)
	OMP_NUM_THREADS=1 $(RUN) tests/suites/official_code.py

results: $(CORE) ## docs/results.md and its picture from the runs of the demo, with machine and date (resumable)
	$(RUN) -m hipexp.run.record_demo docs

reproduced: $(CORE) ## docs/reproduced.md from the runs of make repro-all SIZE=needle that are there
	$(RUN) -m hipexp.repro.record docs

needle: $(CORE) ## train the embedded model from nothing (some four hours on 2 cores, minutes on a GPU; resumable)
	$(RUN) -m hipexp.needle.train

needle-table: $(CORE) ## the long form of the demo: accuracy and time by length (resumable; says how long)
	$(RUN) -m hipexp table

methods: $(CORE) ## every method on the embedded model: score, recall, times, bytes (hours, resumable, says how long; FAST=1: minutes)
	$(if $(FAST),,$(RUN) -m hipexp data make stand-ins out=runs/stand-ins)
	$(RUN) -m hipexp methods jobs=$(JOBS) $(if $(FAST),fast=true,task.data=runs/stand-ins)

ablation: $(CORE) ## what each part of 3stage_plus is worth, between 3stage and the oracle (hours, resumable)
	$(RUN) -m hipexp data make stand-ins out=runs/stand-ins
	$(RUN) -m hipexp methods jobs=$(JOBS) of=ablation task.data=runs/stand-ins

aot: $(DEV) ## compile every kernel for five kinds of GPU, without one: registers, spills, shared memory against the record
	$(RUN) -m hipexp_kernels.aot

bench-cpu: $(CORE) ## attention alone on this CPU: 3stage and 3stage_scan against torch's fastest dense path, with recall (11 minutes)
	$(RUN) -m hipexp -m +pipeline=3stage,3stage_scan $(ALONE) 'task.phases=[prefill]'
	$(RUN) -m hipexp -m +pipeline=3stage,3stage_scan $(ALONE) 'task.contexts_tok=[131072,524288,1048576]' 'task.phases=[decode]'

tune: $(CORE) ## search for pipelines that beat 3stage at no more bytes, from nothing (under an hour; resumable)
	$(RUN) -c 'import optuna' 2>/dev/null || $(PIP) --editable '.[tune]'
	$(RUN) -m hipexp tune $(TUNED)

needle-1m: $(CORE) ## a pass key in 1,048,576 tokens at five depths: 64 MB on the device, the rest in memory and on disk (some 75 minutes; resumable)
	$(RUN) -m hipexp +pipeline=3stage_long offload=disk offload.device_tok=null offload.device_bytes=64000000 offload.host_tok=262144 \
	  task=passkey 'task.lengths_tok=[1048576]' 'task.depths=[0.0,0.25,0.5,0.75,1.0]' task.samples=1

link-table: $(CORE) ## what offload moves over the link at 32K, 64K and 128K, scaled to 1M (some two hours; resumable)
	$(RUN) -m hipexp.run.link_traffic

gpu: $(CORE) ## a GPU: its tests, what it can do, attention alone against every dense kernel, with recall (at most 8 minutes)
	$(RUN) -m hipexp.run.gpu

repro-%: $(CORE) ## a table or figure of the paper beside ours: make repro-table2 SIZE=needle; repro-all: every one (SIZE=needle: 85 minutes, full: 460 GPU hours)
	$(RUN) -m hipexp repro $* jobs=$(JOBS) size=$(SIZE)

$(CORE): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: hipexp needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	test -f $(VENV)/pyvenv.cfg && $(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt setuptools wheel
	$(PIP) --editable .
	@touch $@

$(DEV): $(CORE)
	$(PIP) --editable '.[dev]'
	$(RUN) -c 'import triton' 2>/dev/null || [ "$$(uname)" != Linux ] || $(PIP) triton==$(TRITON)
	@touch $@
