# Tasks for people who work on this repository. Each sets up what it needs; a second run is quick.
#   PYTHON=python3.12   the Python to make .venv from
#   TORCH=torch==2.13.0 what to install when that Python has no torch
#   JOBS=2              parallel compiles
#   ARGS=...            options for `make demo` and `make bench`
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
export PYTHON TORCH JOBS

PY := .venv/bin/python
STAMPS := build/stamps
ENV := tools/dev_env.sh

# The demo needs less than developers do: the extension for this machine alone, in a folder of its own, which compiles
# while torch is installed. Where `make build` has been, its extension serves.
NATIVE := build/native
ifeq ($(wildcard $(STAMPS)/installed),)
DEMO_NEEDS = --jobs=2 native
DEMO_PYTHONPATH = PYTHONPATH="$(CURDIR)/$(NATIVE)/python:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
else
DEMO_NEEDS = build
DEMO_PYTHONPATH =
endif

.PHONY: help build lint format demo test bench wheel sanitize mutants clean distclean native native-extension

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

build: $(STAMPS)/installed  ## Build the extension and make deep_ep importable in .venv.
	@cmake --build build/dev --target deep_ep_cpp deep_ep_bench_cpp --parallel $(JOBS)

lint: $(STAMPS)/venv system-lint  ## Check format, style, types and the boundaries between the layers.
	@tools/lint.sh

format: $(STAMPS)/venv system-lint  ## Rewrite the sources in the project's format.
	@tools/lint.sh --fix

demo:  ## Train a small Mixture-of-Experts model over deep_ep, on whatever this machine has.
	@$(MAKE) $(DEMO_NEEDS)
	@$(DEMO_PYTHONPATH) $(PY) examples/run_demo.py $(ARGS)

test: build system-test  ## Run every test: C++, C++ under both sanitizers, Python.
	@tools/run_tests.sh cpp wheel address thread cuda11 aarch64 python

bench: build  ## Measure the operations; prints a table and writes JSON.
	@$(PY) -m deep_ep bench intranode --save out $(ARGS)

wheel: $(STAMPS)/venv system-build  ## Build the wheel to give away, in dist: manylinux, CUDA 12.4, nothing needed where it is installed.
	@tools/make_wheel.sh

sanitize: system-build system-test  ## Run the C++ tests under AddressSanitizer and ThreadSanitizer alone.
	@tools/run_tests.sh address thread

mutants: system-build system-test  ## Weaken each ordering of the kernels in turn: a test must notice (part of `make test`).
	@tools/run_tests.sh mutants

clean:  ## Remove everything built; keep .venv.
	rm -rf build dist ./*.egg-info deep_ep_cpp.*.so deep_ep_bench_cpp.*.so .mypy_cache .ruff_cache .pytest_cache

distclean: clean  ## Remove .venv too.
	rm -rf .venv

# -- What the tasks stand on -------------------------------------------------------------------------------------------
system-%:
	@$(ENV) system $*

# .venv in three steps: what the extension is built with, what the demo runs with, and all that developers use.
$(STAMPS)/venv-base: $(ENV) pyproject.toml
	@mkdir -p $(STAMPS)
	@$(ENV) venv base
	@touch $@

$(STAMPS)/venv-demo: $(STAMPS)/venv-base
	@$(ENV) venv demo
	@touch $@

$(STAMPS)/venv: $(STAMPS)/venv-demo
	@$(ENV) venv all
	@touch $@

native: $(STAMPS)/venv-demo native-extension

native-extension: $(STAMPS)/venv-base system-build
	@$(ENV) native $(NATIVE)

# An editable install: the package from the working tree, the extension beside it, the CMake tree in build/dev.
$(STAMPS)/installed: $(STAMPS)/venv setup.py CMakeLists.txt $(wildcard cmake/*.cmake) | system-build
	@$(ENV) install
	@touch $@
