# Needs Python 3.11 to 3.13 and make, nothing else. PYTHON=python3.12 make demo picks another Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chaos cluster-test

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/installed
	test -d data/demo || $(BIN)/pwiser data synth --out data/demo --preset demo --impressions 200000 --seed 0 --accidental-clicks 0.3
	$(BIN)/pwiser tune examples/demo.yaml --fresh

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not cluster and not chaos"

# SIGKILL of every part of a running job, CHAOS_KILLS times each (10 by default: 24 rounds of one to four minutes).
chaos: .venv/installed
	CHAOS_KILLS=$(or $(CHAOS_KILLS),10) $(BIN)/pytest tests/chaos --durations 10

# The service on hosts of its own: needs root, iproute2, curl and Debian's postgresql; skips with a reason without.
cluster-test: .venv/installed
	$(BIN)/pytest -m cluster --durations 10
