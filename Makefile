# Everything a contributor runs. Needs Python 3.11 or newer, gcc, and the package index that pip is configured for.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$name >/dev/null 2>&1 \
	&& $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$name && break; done)
# Set in many images, and with it every process compiles again what it imports.
unexport PYTHONDONTWRITEBYTECODE
UV ?= uv
PIP_AUDIT ?= pip-audit

VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed
REGION := $(VENV)/.region
CELERY_5_6 := .matrix/celery-5.6
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps
EDITABLE := $(PIP) --no-build-isolation --editable .
COMPILE := $(UV) pip compile --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --quiet

.PHONY: help installed demo test lint check test-kernels test-celery-5.6 test-matrix faults faults-celery-5.6 settings lock sbom audit-pins bench clean
.DEFAULT_GOAL := help

help: ## Say what can be made
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What the demonstration needs; the tests need that and more.
$(DEMO): requirements/demo.txt requirements/install.py pyproject.toml | $(BIN)/python
	@$(BIN)/python requirements/install.py requirements/demo.txt
	@$(EDITABLE)
	@touch $@

$(INSTALLED): requirements/lock.txt requirements/install.py pyproject.toml | $(BIN)/python
	@$(BIN)/python requirements/install.py requirements/lock.txt
	@$(EDITABLE)
	@touch $@

# Optional for users; tests and measurements are about it. Takes a C compiler and Python's headers.
$(REGION): $(INSTALLED) plugins/jpeg/pyproject.toml $(wildcard plugins/jpeg/code_worker_jpeg/*.*)
	@$(PIP) --no-build-isolation ./plugins/jpeg
	@touch $@

installed: $(INSTALLED) $(REGION) $(CELERY_5_6)/.installed ## Install what all checks need

demo: $(DEMO) ## Run the main job on a toy set, have it learn, print what happened
	$(BIN)/code-worker demo

# By file, in more processes than there are cores, since tests wait more than they compute.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) $(REGION) ## Run every test
	$(PYTEST)

lint: $(INSTALLED) ## Lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto
	$(BIN)/lint-imports

check: lint test ## What CI runs, but for the older Celery

test-kernels: $(INSTALLED) $(REGION) ## Run the numeric tests on every set of kernels that this processor has
	$(BIN)/python -m tests.kernels

$(CELERY_5_6)/.installed: $(INSTALLED) requirements/celery-5.6.txt
	rm -rf $(CELERY_5_6)
	@$(PIP) --require-hashes --target $(CELERY_5_6) -r requirements/celery-5.6.txt
	@touch $@

# What Celery has a part in, on one kind of database, in which it has none; the whole matrix is faults-celery-5.6.
WITH_CELERY := $(patsubst %,tests/worker/test_%.py,configuration install messages priority publisher schedule sweeper transport worker) \
	$(patsubst %,tests/faults/test_%.py,beats broker_deaths full_broker races stopping strange_messages worker_deaths)

test-celery-5.6: $(CELERY_5_6)/.installed $(REGION) ## Run the tests that Celery has a part in on Celery 5.6
	PYTHONPATH="$(CURDIR)/$(CELERY_5_6)" $(BIN)/python -c 'import celery; assert celery.__version__ == "5.6.3", celery'
	PYTHONPATH="$(CURDIR)/$(CELERY_5_6)" $(PYTEST) -k "not sqlite or FLUSHALL" $(WITH_CELERY)

test-matrix: test-celery-5.6 ## Run them on both supported lines of Celery
	$(PYTEST) $(WITH_CELERY)

FAULTS = -m pytest tests --rows "$(ROWS)" --fault-report docs/reliability.md $(ARGS)

faults: $(INSTALLED) $(REGION) ## Run the fault matrix, the long rows too, and write docs/reliability.md (ROWS="F3 F5")
	$(BIN)/python $(FAULTS) -m "row or nightly"

faults-celery-5.6: $(CELERY_5_6)/.installed $(REGION) ## Run the short rows that have a broker on Celery 5.6, into the same table
	PYTHONPATH="$(CURDIR)/$(CELERY_5_6)" $(BIN)/python $(FAULTS) -m "row and not nightly" --broker-rows

settings: $(INSTALLED) ## Write docs/settings.md from the settings
	$(BIN)/python docs/generate_settings.py

lock: ## Resolve the dependencies anew (UPGRADE=--upgrade takes the newest); needs uv
	$(COMPILE) $(UPGRADE) --all-extras --output-file requirements/lock.txt pyproject.toml
	$(COMPILE) --extra worker --extra training --extra openvino --constraint requirements/lock.txt --output-file requirements/worker.txt pyproject.toml
	$(COMPILE) --extra demo --constraint requirements/lock.txt --output-file requirements/demo.txt pyproject.toml requirements/build.in
	$(COMPILE) --constraint requirements/lock.txt --output-file requirements/build.txt requirements/build.in
	$(COMPILE) $(UPGRADE) --output-file requirements/uv.txt requirements/uv.in
	$(COMPILE) --no-deps --output-file requirements/celery-5.6.txt requirements/celery-5.6.in

sbom: ## Write the bill of materials of the production lock, CycloneDX, to dist/
	$(PYTHON) deploy/sbom.py --output dist/code-worker.cdx.json

audit-pins: ## Ask the vulnerability service about every pin; needs pip-audit and the internet
	$(PIP_AUDIT) --require-hashes --disable-pip $(foreach lock,$(wildcard requirements/*.txt),-r $(lock))

bench: $(INSTALLED) $(REGION) ## Measure beside others (PARTS="pipeline decoding", ARGS="--quick --json FILE")
	$(BIN)/python -m bench $(PARTS) $(ARGS)

clean: ## Remove what was built here, the environment included
	rm -rf $(VENV) .matrix .demo build dist plugins/jpeg/build plugins/jpeg/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
