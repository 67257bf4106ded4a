# Everything a developer needs; `make` alone lists it. Only python3 3.11.2+ is required, no Docker and no database.

VENV   := .venv
STAMP  := $(VENV)/.complete
# What an interpreter must be able to do. Debian and Ubuntu ship ensurepip apart, in python3-venv.
FIT    := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11, 2))
# The first interpreter that is fit; choose another with `make setup PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c '$(FIT)' 2>/dev/null && echo $$p && break; done)
# Empty when the environment is that of the interpreter asked for by name, if one was.
SAME    = [ -e $(VENV)/bin/python ] && [ "$$('$(PYTHON)' -VV 2>&1)" = "$$($(VENV)/bin/python -VV 2>&1)" ]
OTHER  := $(if $(filter file,$(origin PYTHON)),,$(shell $(SAME) || echo other))

TESTS   :=
MINUTES := 5
SEED    :=

.PHONY: help setup run demo test drills check explore test-tools lint format docs bench clean FORCE

help:
	@echo 'make setup       create .venv with everything in it (the other targets do so when it is missing)'
	@echo 'make run         PostgreSQL, a broker and every role on this machine, data kept between runs'
	@echo 'make demo        10,000 events through all of it, with a table of what became of them'
	@echo 'make test        the whole test suite, or TESTS=tests/unit; alike for everybody'
	@echo 'make drills      what takes long: an installed wheel, backups and restores, rolling upgrades, real monitoring'
	@echo 'make check       make lint and make test: what a change must pass'
	@echo 'make explore     the property tests from other seeds for MINUTES=5; SEED=123 repeats what was found'
	@echo 'make test-tools  install what some tests need, in .tools and with apt-get, or say what is missing'
	@echo 'make lint        form, types and imports'
	@echo 'make docs        write what is made from other files (reference, dashboards, copies); tests fail while it is stale'
	@echo 'make format      put the code into its form'
	@echo 'make bench       every benchmark, one JSON object each; takes about an hour'
	@echo 'make clean       remove .venv, .tools and caches; data of `make run` stays'

setup: $(STAMP)
	@:

# What has been left half made is made again from the start. Of several at once one makes it, and the others wait.
define MAKE_VENV
same() { [ -z "$(OTHER)" ] || { $(SAME); }; }
if [ -e $(STAMP) ] && ! [ pyproject.toml -nt $(STAMP) ] && same; then exit 0; fi
clear=
if [ -e $(VENV)/pyvenv.cfg ] && ! { [ -e $(STAMP) ] && same; }; then clear=--clear; fi
rm -f $(STAMP)
'$(PYTHON)' -m venv $$clear $(VENV)
$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
touch $(STAMP)
endef
$(STAMP): export SCRIPT = $(MAKE_VENV)
$(STAMP): pyproject.toml $(if $(OTHER),FORCE)
	@test -n '$(PYTHON)' || { echo 'Python 3.11.2 or newer that can make virtual environments is needed: install it (on Debian' \
		'and Ubuntu: apt-get install python3 python3-venv), or name it: make setup PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11, 2))' 2>/dev/null || { echo 'Python 3.11.2 or newer is' \
		"needed, but $(PYTHON) is: $$('$(PYTHON)' --version 2>&1); set PYTHON=/path/to/python" >&2; exit 1; }
	@'$(PYTHON)' -c '$(FIT)' 2>/dev/null || { echo '$(PYTHON) cannot make virtual environments: on Debian and Ubuntu' \
		'apt-get install python3-venv, or set PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c 'import fcntl, os; lock = os.open(".", os.O_RDONLY); fcntl.flock(lock, fcntl.LOCK_EX); \
		os.set_inheritable(lock, True); os.execv("/bin/sh", ["sh", "-euc", os.environ["SCRIPT"]])'

run: setup
	$(VENV)/bin/orchestrator dev

demo: setup
	$(VENV)/bin/orchestrator demo

test: setup
	$(VENV)/bin/pytest -n 3 --dist loadgroup $(or $(TESTS),--ignore=tests/drills)

drills: setup
	$(VENV)/bin/pytest -n 3 --dist loadgroup tests/drills

check: lint test

explore: setup
	$(VENV)/bin/python -m tests.support.exploring --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

test-tools:
	@PYTHON='$(PYTHON)' .ci/test-tools

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: setup
	$(VENV)/bin/python -m docs.generate
	$(VENV)/bin/python -m ops.grafana.generate

bench: setup
	@for scenario in lifecycle deliver-http steady herd api ingest deliver-kafka pipeline rate parallel fairness claim \
		backlog held-snapshot soak cost; do \
		$(VENV)/bin/orchestrator bench $$scenario --json || exit 1; done

clean:
	rm -rf $(VENV) .venv-* .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
