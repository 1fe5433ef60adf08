# Two commands do everything: `make demo` and `make test`. Both set up .venv when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export NO_ALBUMENTATIONS_UPDATE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo test check clean

help:
	@echo "make setup   create .venv with pinned versions"
	@echo "make demo    run the whole line offline on a small web drawn here (about 2 minutes after set-up)"
	@echo "make test    format, lint, types, tests"
	@echo "make check   format, lint, types only"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "curate needs Python 3.11 or newer; say which with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/curate demo

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict curate pipelines

test: check
	$(BIN)/pytest --numprocesses 2 --dist loadfile  # many tests wait for deadlines and kills: two at a time

clean:
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
