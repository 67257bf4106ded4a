# Everything a developer needs; `make` alone lists it. Only python3 3.11+ is required, no Docker and no database.

VENV  := .venv
STAMP := $(VENV)/.complete
# The first interpreter that is new enough; choose another with `make setup PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup run demo test lint format bench clean

help:
	@echo 'make setup    create .venv with everything in it (the other targets do so when it is missing)'
	@echo 'make run      PostgreSQL, a broker and every role on this machine, data kept between runs'
	@echo 'make demo     10,000 events through all of it, with a table of what became of them'
	@echo 'make test     the whole test suite'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   put the code into its form'
	@echo 'make bench    every benchmark, one JSON object each; takes about an hour'
	@echo 'make clean    remove .venv and caches; data of `make run` stays'

setup: $(STAMP)
	@:

$(STAMP): pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed: install it, or name it: make setup PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1): set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $(STAMP)

run: setup
	$(VENV)/bin/orchestrator dev

demo: setup
	$(VENV)/bin/orchestrator demo

test: setup
	$(VENV)/bin/pytest -n 3 --dist loadgroup

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup
	@for scenario in lifecycle deliver-http steady herd api ingest deliver-kafka pipeline rate parallel fairness claim \
		backlog held-snapshot soak; do \
		$(VENV)/bin/orchestrator bench $$scenario --json || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
