# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
#
# Every target sets up .venv by itself. `make help` lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

# The first Python on the PATH that is new enough. Another one: make PYTHON=/path/to/python ...
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# For `make serve`: MODEL is the embedded model, a Hugging Face id or a path; ARGS goes to `vllm serve`.
# For demo, bench and the tests: ARGS goes to the command behind the target.
MODEL ?= smollm2
PORT ?= 8000
ARGS ?=

# GiB of KV cache on a CPU; vLLM would take half the machine's memory.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
# `make system-tools` may have put tools there.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo serve test test-all lint format typecheck eval bench native sanitize lock clean system-tools prerequisites

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BIN)/.runtime ## serve the embedded model and show what is saved
	$(BIN)/python scripts/demo.py $(ARGS)

serve: $(BIN)/.runtime ## serve MODEL (default smollm2) with deltamem on PORT (default 8000); ARGS="..."
	@set -e; model='$(MODEL)'; name=(); \
	if [ "$$model" = smollm2 ]; then \
		model=$$($(BIN)/deltamem model get smollm2); \
		name=(--served-model-name smollm2); export HF_HUB_OFFLINE=1; \
	fi; \
	exec $(BIN)/vllm serve "$$model" "$${name[@]}" --kv-cache-policy deltamem \
		--host 127.0.0.1 --port $(PORT) $(ARGS)

# HF_HUB_OFFLINE: the tests bring every model along; one that asks the network for it must fail here too.
test: $(BIN)/.dev system-tools ## the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m "not matrix and not slow" $(ARGS)

test-all: $(BIN)/.dev system-tools ## all tests, with the whole exactness matrix
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(ARGS)

lint: $(BIN)/.dev ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(BIN)/.dev ## repair what `make lint` can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# server/ and triton_kernels/ are packages inside deltamem_vllm once installed (setup.py); mypy reads
# folders, so it is shown them where they belong.
typecheck: $(BIN)/.dev ## mypy, strict
	@rm -rf build/typecheck && mkdir -p build/typecheck/deltamem_vllm
	@ln -s $(addprefix $(CURDIR)/,$(wildcard deltamem_vllm/*) server triton_kernels) build/typecheck/deltamem_vllm/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/build/mypy-cache -p deltamem_vllm

# .dev: they draw pictures, and matplotlib is no part of a server.
eval: $(BIN)/.dev ## what eviction costs in answers and fidelity; ARGS="--quick"
	$(BIN)/deltamem eval $(ARGS)

bench: $(BIN)/.dev ## stock vLLM against deltamem; ARGS="--quick"
	$(BIN)/deltamem bench $(ARGS)

# Only what changed is compiled; .runtime does the same when it installs the package.
native: | prerequisites ## build the native library again after a change in csrc/
	$(PYTHON) csrc/build.py

# The kernels' tests once more, in a process whose memory is watched. Leaks are Python's own, at its end.
SANITIZED := $(CURDIR)/build/sanitized/_native.so
sanitize: $(BIN)/.dev ## the native kernels' tests under AddressSanitizer and UBSan; ARGS="..."
	$(BIN)/python csrc/build.py --strict --sanitize --output $(SANITIZED) --work build/sanitized
	$(BIN)/python scripts/sanitize.py $(SANITIZED) $(ARGS)

lock: | prerequisites ## resolve requirements/*.in again into requirements/*.txt
	scripts/lock.sh $(PYTHON)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info packaging/*/build packaging/*/*.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis deltamem_vllm/_native.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Tests of metrics, panels and rules use promtool and a real Prometheus; they are skipped with a reason when there is none.
# Only these programs are taken out of Debian's package: installing the package would start a monitoring server.
system-tools: $(BIN)/.runtime
	@{ command -v promtool && command -v prometheus; } >/dev/null || scripts/get-promtool.sh $(BIN) promtool prometheus || \
		echo "make: no prometheus: the tests that need it will be skipped (Debian: apt-get install prometheus)" >&2

prerequisites:
	@"$(or $(PYTHON),none)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "deltamem needs Python 3.11 or newer, found: $$($(or $(PYTHON),python3) --version 2>&1)." \
		"Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { \
		echo "deltamem needs a C++ compiler: torch.compile builds the model's kernels with it." \
		"Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sys, sysconfig; \
		sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
		echo "$(PYTHON) lacks its venv module or the C headers that torch.compile needs." \
		"Debian and Ubuntu: apt-get install python3-venv python3-dev" >&2; exit 1; }

# --no-deps: the lock is complete and leaves some of vLLM's declared dependencies out (scripts/lock.sh).
# torch alone brings its own along, for they differ with the kind of build that the index offers.
$(BIN)/.runtime: requirements/cpu.txt pyproject.toml setup.py packaging/vllm-cpu-metadata/pyproject.toml \
		$(wildcard csrc/*.py csrc/cpu/*) | prerequisites
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)" && $(PIP) install '$(TORCH)'
	@echo "installing requirements/cpu.txt" && $(PIP) install --no-deps -r requirements/cpu.txt
	@echo "installing deltamem" && $(PIP) install --no-deps --no-build-isolation \
		./packaging/vllm-cpu-metadata -e .
	@touch $@

$(BIN)/.dev: requirements/dev.txt $(BIN)/.runtime
	@echo "installing requirements/dev.txt" && $(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

# Needs a CUDA build of torch, which `pip install torch` brings on Linux unless PIP_FIND_LINKS has another one.
.PHONY: gpu-check
gpu-check: $(BIN)/.runtime ## GPU kernels: right and how fast; ARGS="--compile-only" needs no GPU
	$(BIN)/python -m deltamem_vllm.evaluation.gpu_check $(ARGS)
