# `make help` lists what there is. Everything is installed into .venv, nothing outside this folder (but see `install`).
#
# Variables, as in `make demo PYTHON=python3.12`:
#   PYTHON  the interpreter, 3.11 or 3.12; otherwise the first suitable one found
#   TORCH   what pip installs first. Another version: TORCH=torch==2.11.0. Another build (CPU only, or a CUDA version):
#           point pip at where it lies with pip's own configuration, e.g. PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or
#           PIP_FIND_LINKS; or give a file: TORCH=/path/to/torch.whl
#   PORT    port of `make serve`
#   PREFIX  where `make install` puts the command
#   QUIET   pip's -q flags; QUIET= shows all that pip says
#   WORKERS processes that run tests; many tests wait more than they compute, so more than there are cores
#   ARGS    more arguments for demo, serve, test (pytest) and bench

CANDIDATES := python3.11 python3.12 python3 python
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
TORCH ?= $(shell grep '^torch==' constraints.txt)
QUIET ?= -qq
PORT ?= 8180
PREFIX ?= /usr/local
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install $(QUIET) -c $(VENV)/constraints.txt
TIMED = s=$$(date +%s); $(1) || { echo >&2 "make: pip failed; with QUIET= behind the target it says more"; exit 1; }; \
	echo "    done in $$(( $$(date +%s) - s )) s"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test lint bench install clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(VENV)/.run ## start a server with a small real model, ask it a few things, stop it
	@$(BIN)/fastdeploy demo $(ARGS)

serve: $(VENV)/.run ## the same model on http://127.0.0.1:8180 (PORT=...) until Ctrl-C
	@exec $(BIN)/fastdeploy serve-demo --port $(PORT) $(ARGS)

test: lint ## format, lint, types, all tests
	@$(BIN)/fastdeploy demo-model >/dev/null
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.dev ## format, lint and types only
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/.dev ## measure against transformers on this machine's CPU
	@$(BIN)/python benchmarks/cpu_offline.py $(ARGS)

install: $(VENV)/.run ## put the command `fastdeploy` into PREFIX/bin; it runs from this folder
	@mkdir -p "$(DESTDIR)$(PREFIX)/bin"
	@printf '#!/bin/sh\nexec "%s" -m fastdeploy.entrypoints.cli "$$@"\n' "$(abspath $(BIN))/python" \
		> "$(DESTDIR)$(PREFIX)/bin/fastdeploy"
	@printf '#!/bin/sh\nexec "%s" "$$@"\n' "$(abspath $(BIN))/fd-router" > "$(DESTDIR)$(PREFIX)/bin/fd-router"
	@chmod 755 "$(DESTDIR)$(PREFIX)/bin/fastdeploy" "$(DESTDIR)$(PREFIX)/bin/fd-router"
	@echo "installed $(DESTDIR)$(PREFIX)/bin/fastdeploy: $$("$(DESTDIR)$(PREFIX)/bin/fastdeploy" --version)"

clean: ## remove what was installed and cached here (not the models in the cache folder)
	@rm -rf $(VENV) build dist fastdeploy.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo >&2 "make: Python 3.11 or 3.12 is needed; looked for $(CANDIDATES) in PATH." \
		"Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo >&2 "make: PYTHON=$(PYTHON) is not Python 3.11 or 3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo >&2 "make: $(PYTHON) cannot make virtual environments: it lacks ensurepip." \
		"On Debian and Ubuntu: apt install python$$v-venv"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch goes first and without its pin, so that TORCH decides; what comes after takes the one that is there.
$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@echo "installing $(TORCH) (the largest package by far)"
	@$(call TIMED,$(PIP) "$(TORCH)" setuptools)
	@echo "installing fastdeploy and what it runs with"
	@$(call TIMED,$(PIP) --no-build-isolation -e ".[demo]")
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need"
	@$(call TIMED,$(PIP) --no-build-isolation -e ".[dev]")
	@touch $@
