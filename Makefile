# `make test` and `make demo` set up everything they need themselves; `make help` lists the rest.

# The first of these that is new enough (see `ort` in pyproject.toml); or make test PYTHON=/path/to/python
PYTHON ?= $(or $(firstword $(foreach p,python3 python3.12 python3.11,$(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(p)))),python3)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# PyPI's torch for Linux brings CUDA along. For the much smaller CPU build where it is not the default:
# make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# How many cases `make fuzz` runs.
CASES ?= 10000

# What `make demo` asks.
PICTURE ?= $(firstword $(sort $(wildcard samples/easyvqa/pictures/*.png)))
PROMPT ?= what color is the shape?

CHECKPOINT := samples/easyvqa/checkpoint
BIN := .venv/bin
# Without bytecode of all that is installed: Python writes that of what it imports.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
# Runs a command and prints what it said only if it failed.
quietly = @out=$$($(1) 2>&1) || { printf '%s\n' "$$out"; exit 1; }

# Two workers, and the tests that need no GPU, no TensorRT and no released checkpoint.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
HERE := not gpu and not trt and not weights

MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:
.PHONY: help test slow fuzz lint format demo clean
.DEFAULT_GOAL := help

help:
	@echo "make test     every check: ruff, mypy, import-linter, pytest"
	@echo "make demo     export the sample model with FastV, check it, and ask it about a picture"
	@echo "make slow     the tests marked slow: whole matrices of options"
	@echo "make fuzz     damaged pictures, prompts, options and files: CASES of them, with progress and a summary"
	@echo "make lint     every check but the tests"
	@echo "make format   format the code and fix what ruff can fix"
	@echo "make clean    remove what was made, but not .venv"
	@echo "variables: PYTHON, TORCH_INDEX, PICTURE, PROMPT, CASES"

test: lint
	@$(BIN)/pytest $(SHARED) -m '$(HERE) and not slow'

slow: .venv/dev.stamp
	@$(BIN)/pytest $(SHARED) -m '$(HERE) and slow'

fuzz: .venv/dev.stamp
	@$(BIN)/python tests/fuzz.py --cases $(CASES)

lint: .venv/dev.stamp .types/lvlm_edge
	$(call quietly,$(BIN)/ruff check --no-cache)
	$(call quietly,$(BIN)/ruff format --check --no-cache)
	$(call quietly,$(BIN)/mypy)
	$(call quietly,PYTHONPATH=.types $(BIN)/lint-imports --no-cache --no-logo)

format: .venv/dev.stamp
	@$(BIN)/ruff check --fix -q --no-cache || true
	@$(BIN)/ruff format -q --no-cache

demo: .venv/demo.stamp
	@mkdir -p demo
	@echo "== export: $(CHECKPOINT), keeping a quarter of the visual tokens from layer 2 on"
	@$(BIN)/lvlm-edge export $(CHECKPOINT) -o demo/bundle --method fastv --prune-layer 2 --keep-ratio 0.25 --force
	@echo "== check: the bundle against PyTorch"
	@$(BIN)/lvlm-edge check demo/bundle --against $(CHECKPOINT)
	@echo "== run: $(PICTURE): $(PROMPT)"
	@$(BIN)/lvlm-edge run demo/bundle --image "$(PICTURE)" --prompt "$(PROMPT)" --overlay demo/kept.png --stats

clean:
	@rm -rf build dist demo tests/.oracles .types .mypy_cache .ruff_cache .pytest_cache *.egg-info

# torch first and alone, so that only this step looks at TORCH_INDEX.
.venv/demo.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "make: $(PYTHON) is too old, 3.11 or newer is needed; set PYTHON" >&2; exit 1; }
	@echo "setting up .venv (minutes, mostly downloads)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	@$(PIP) -e '.[export,ort]'
	@touch $@

.venv/dev.stamp: .venv/demo.stamp
	@$(PIP) -e '.[export,ort,quantize,dev]'
	@touch $@

# mypy and import-linter do not follow the folder mapping of an editable install.
.types/lvlm_edge:
	@mkdir -p $@
	@ln -s ../../exporter ../../runtime ../../profiles $@
