# Each target creates the virtual environment it needs, once; the second time is quick.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN = $(VENV)/bin
PYTEST_ARGS ?=
# Without its bytecode torch is compiled anew at every start, which takes longer than most tests.
export PYTHONDONTWRITEBYTECODE =
# What must work on the oldest torch, as far as it exists.
CORE = $(wildcard tests/values tests/sim tests/engine tests/tracing)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest check bench clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## Real networks with and without offload, simulated and run; writes results/demo/.
	$(BIN)/vdnn experiment experiments/demo.toml --force

test: $(VENV)/.installed  ## The tests, without the slow ones. GPU tests skip themselves where there is no GPU.
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed  ## Every test, and the core tests on the oldest supported torch.
	$(BIN)/python -m pytest -q -n 2 $(PYTEST_ARGS)
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.installed  ## The core tests on the oldest supported torch.
	$(OLDEST)/bin/python -m pytest -q -n 2 -m "not slow" $(PYTEST_ARGS) $(CORE)

check: $(VENV)/.installed  ## Format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## The benchmarks in experiments/bench_*.py, one after the other.
	@for script in $(sort $(wildcard experiments/bench_*.py)); do \
		echo "== $$script" && $(BIN)/python $$script || exit 1; \
	done

clean:  ## Remove the virtual environments and all caches; results stay.
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.installed: CONSTRAINTS = constraints.txt
$(OLDEST)/.installed: CONSTRAINTS = constraints-oldest.txt
$(VENV)/.installed: constraints.txt
$(OLDEST)/.installed: constraints-oldest.txt

%/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into $*, with $(CONSTRAINTS): once, some minutes" >&2
	@test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@
