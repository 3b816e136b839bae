# make setup   a virtual environment in .venv with everything a developer needs
# make demo    the whole system on real data, on this machine   (DEMO_ARGS=...)
# make test    the test suite, as continuous integration runs it: two processes, the files of tests in their order
# make torture long kill, fuzz and scale runs
# make docs    the site of docs/, into build/site
# make lint    ruff, format check, mypy
# make openseadragon  renew the viewer's OpenSeadragon (VERSION=...; needs npm)
# make clean   remove caches and the output of the demo
#
# PYTHON=...   the interpreter to build .venv with; default: the first one found that is 3.11 or newer
# PIP_ARGS=... further arguments of pip install; for the much smaller torch without CUDA:
#              PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14
IS_NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))

PYTHON ?=
PIP_ARGS ?=
DEMO_ARGS ?=

.PHONY: help setup demo test torture docs lint openseadragon clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tests/kernels/compilers.txt tests/predictions/napari.txt tools/fetch_chromium.py
	@python=""; \
	for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
	  if "$$candidate" -c "$(IS_NEW_ENOUGH)" 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "setup: no Python 3.11 or newer among: $(or $(PYTHON),$(CANDIDATES)); give one with PYTHON=..." >&2; exit 2; \
	fi; \
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "setup: making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	    "$$python" -m venv --clear --without-pip $(VENV); \
	    "$$python" -m pip --quiet --quiet --python $(BIN)/python install pip; }; \
	fi
	@echo "setup: installing the packages of constraints.txt (minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check \
	  --constraint constraints.txt $(PIP_ARGS) --editable ".[dev]"
	@# alone: it asks for torchvision, which comes as a CUDA build; the tests stand in for what it takes from there
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps \
	  --constraint constraints.txt $(PIP_ARGS) timm
	@# in a folder of their own: torch for CUDA pins packages of the same names
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/share/nvrtc $(PIP_ARGS) --requirement tests/kernels/compilers.txt
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/share/napari $(PIP_ARGS) --requirement tests/predictions/napari.txt
	@# for the tests of the viewer, which skip without one
	@$(BIN)/python tools/fetch_chromium.py $(VENV)/share/chromium \
	  || echo "setup: no Chromium; tests in a browser take an installed one, or skip"
	@touch $@
	@echo "setup: done"

demo: setup
	@$(BIN)/ats-stream demo $(DEMO_ARGS)

test: setup
	@$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

torture: setup
	@$(BIN)/python -m pytest -q -m torture

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

openseadragon:
	@$(BIN)/python tools/fetch_openseadragon.py $(VERSION)

clean:
	@rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
