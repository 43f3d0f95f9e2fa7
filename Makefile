# make demo   set-up and the main job          make test       set-up, lint and the tests of every day
# make venv   set-up alone                     make test-all   the slow matrices as well
# make lint   ruff and mypy
# make bench  the short benchmarks
# PYTHON=...  the interpreter of the environment, 3.11 or 3.12 (only used when .venv is made)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := venv
.PHONY: venv demo test test-all pytest lint bench requirements clean

PYTHON ?= $(firstword $(foreach version,3.12 3.11,$(shell python$(version) --version >/dev/null 2>&1 && echo python$(version))))
BIN := .venv/bin
READY := .venv/.ready
IMPORTED := deepspeed, timm, ray, rich.progress, mlflow.store.tracking.sqlalchemy_store, omegaconf, sklearn.svm, hypothesis, pytest

venv: $(READY)

# uv makes and fills the environment when it is installed; else pip puts it into the environment first.
# `compat` adds this directory to the path: the default finder loses against any directory called pretrain beside it.
# The last step compiles what a run imports, even where PYTHONDONTWRITEBYTECODE is set: without byte code each worker
# process starts three times as slowly. Compiling all of the 20 000 files would take four times as long as this.
$(READY): pyproject.toml requirements/dev.txt
	@[ -n "$(PYTHON)" ] || { echo "make: Python 3.11 or 3.12 is needed; name one with PYTHON=..." >&2; exit 2; }
	rm -rf .venv
	if uv --version >/dev/null 2>&1; then \
	    uv venv --quiet --python "$(PYTHON)" .venv; \
	    uv=uv; \
	else \
	    "$(PYTHON)" -m venv .venv; \
	    $(BIN)/python -m pip install --quiet uv; \
	    uv=$(BIN)/uv; \
	fi; \
	$$uv pip install --python $(BIN)/python -r requirements/dev.txt; \
	$$uv pip install --python $(BIN)/python --no-deps --no-build-isolation -C editable_mode=compat -e .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -W ignore -c "import $(IMPORTED)" >/dev/null
	touch $@

demo: $(READY)
	$(BIN)/pretrain run demo

# Two processes of tests, of one thread each: more threads than cores wait for one another. Files stay whole, so that
# fixtures which start processes are shared; in their own order, the long ones are not last.
TESTERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(MAKE) --jobs=2 lint pytest

pytest: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(MAKE) lint
	$(PYTEST) -m "long or not long"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Each prints its tables and knows --short; benchmarks/RESULTS.md has what the long forms said. CPU-seconds are what counts,
# so one at a time. PEERS=PYTHON adds the job beside lightly-train, by an interpreter that has the extra `bench`.
BENCHMARKS := step_cost growth job_cost
CIFAR10 ?= ../shared/data/cifar10
bench: $(READY)
	@for name in $(BENCHMARKS); do \
	    echo "== $$name --short"; \
	    OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py --short; \
	done
	@if [ -n "$(PEERS)" ]; then \
	    echo "== job_cost --peers --short"; \
	    OMP_NUM_THREADS=1 $(BIN)/python benchmarks/job_cost.py --peers --short --cifar10 $(CIFAR10) --peer-python $(PEERS); \
	fi

# Resolve the newest versions that pyproject.toml allows, for Python 3.11, and make sure that 3.12 needs no others.
resolve = uv pip compile pyproject.toml --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet
header = '\# Every package of the environment; made by `make requirements`, for Linux with Python 3.11 and 3.12.'
requirements:
	$(resolve) --python-version 3.11 --extra dev --upgrade | { echo $(header); cat; } > requirements/dev.txt
	$(resolve) --python-version 3.11 --constraint requirements/dev.txt | { echo $(header); cat; } > requirements/runtime.txt
	$(resolve) --python-version 3.11 --extra bench --constraint requirements/dev.txt >/dev/null  # peers go with the pins
	$(resolve) --python-version 3.12 --extra dev --constraint requirements/dev.txt | { ! grep -vxFf requirements/dev.txt; }

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
