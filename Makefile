# One command each; only git, make and Python 3.11+ are needed. More options through ARGS="...", e.g.
#   make train ARGS="--rounds 2 out=runs/second"        make fast ARGS="-k dpo"
VENV := .venv
BIN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help train test fast lint clean
.DELETE_ON_ERROR:

help:
	@echo "make train   install into $(VENV) and align the embedded diffusion model, about two minutes on two cores"
	@echo "make test    lint, types and every test      make fast   the fast tests      make lint   ruff and mypy"

train: $(VENV)/installed
	$(BIN)/mmpo train --modality diffusion $(ARGS)

test: lint
	$(PYTEST) -n auto --maxprocesses 4 -m "not slow and not gpu" $(ARGS)
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile -m "slow and not gpu" $(ARGS)

fast: $(VENV)/installed-dev
	$(PYTEST) -n auto --maxprocesses 4 -m "not slow and not gpu" $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

# Said before, as pip names a full disk only at its end. 7 GB stay; pip keeps what it downloads (3 GB) until then.
define room
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); [ "$${free:-99}" -ge 10 ] || \
		echo "$$free GB are free here; the installation may need 10 (most of it torch's CUDA libraries)" >&2
endef

# A stamp file, so that the installation is repeated only when the requirements change.
$(VENV)/installed: $(BIN)/python $(SETUP)
	$(room)
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/installed-dev: $(BIN)/python $(SETUP)
	$(room)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $(VENV)/installed $@

# The first interpreter that runs and is new enough; a name on PATH alone proves neither.
$(BIN)/python:
	@for python in python3 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "creating $(VENV) with $$python"; \
			$$python -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); \
			echo "$$python cannot create a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; \
		fi; \
	done; \
	echo "mmpo needs Python 3.11 or newer; python3 here is: $$(python3 --version 2>&1 || echo missing)." >&2; \
	echo "Install Python 3.11 or newer so that python3 or python3.11 runs it, then repeat the command." >&2; exit 1
