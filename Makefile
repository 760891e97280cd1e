# What is installed where: .venv, from pyproject.toml, again whenever that changes. More for pytest: make test ARGS="-k sse"

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
MINUTES ?= 20

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint conformance bench bench-peers soak history canaries

help: ## what you are reading
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/installed ## install, and start the gateway on http://127.0.0.1:8000
	$(BIN)/gateway serve $(ARGS)

test: $(VENV)/installed-test ## install what the tests need, and run all of them
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/installed-dev ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

conformance: $(VENV)/installed-test ## suites that others wrote, against a gateway started for them
	$(BIN)/python -m conformance $(ARGS)

bench: $(VENV)/installed-test ## what a request costs, with everything on
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(VENV)/installed-test ## the same for other gateways, installed into build/peers (850 MB)
	$(BIN)/python -m benchmarks --peers $(ARGS)

soak: $(VENV)/installed-test ## the gateway at half load for 20 minutes (MINUTES=20), and its memory
	$(BIN)/python -m benchmarks --soak $(MINUTES) $(ARGS)

history: $(VENV)/installed-test ## 10,000 operations of many clients, workers killed in between, and a check of what is kept
	HISTORY_OPERATIONS=10000 $(BIN)/python -m pytest tests_standalone/system/test_history.py $(ARGS)

canaries: $(VENV)/installed-test ## 500 clients that leave at any moment, for 10 minutes: nobody gets a word of another's
	CANARY_SECONDS=600 $(BIN)/python -m pytest -s tests_standalone/system/test_canaries.py $(ARGS)

$(VENV)/installed: pyproject.toml | $(BIN)/pip
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-%: pyproject.toml | $(BIN)/pip
	$(PIP) --editable ".[$*]"
	@touch $@ $(VENV)/installed

$(BIN)/pip:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue; \
		echo "$$python -m venv $(VENV)"; \
		"$$python" -m venv $(VENV) && exit; \
		rm -rf $(VENV); \
		echo "$$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)." >&2; \
		exit 1; \
	done; \
	echo "Python 3.11 or newer is needed, and none is on PATH: make run PYTHON=/path/to/python3" >&2; \
	exit 1
