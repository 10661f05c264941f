# Every target is complete in itself: it first installs what is missing (scripts/prepare).
BIN = .venv/bin

.PHONY: help prepare demo test test-slow test-matrix test-model lint migration release bench bench-quick bench-page \
	cases chaos mutants clean

help: ## Show this list
	@awk -F ':.*## ' '/^(# )?[a-z-]+:.*## / { sub(/^# /, "")} /^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

prepare: ## Install what is missing: PostgreSQL, pg_cron, .venv
	@scripts/prepare

demo: prepare ## Lose a worker to SIGKILL and see its job rescued by PostgreSQL itself
	@$(BIN)/python -m demo

test: prepare ## Run the tests; a part of them with ARGS="-k queueing_lock"
	@$(BIN)/pytest -n 6 --dist worksteal $(ARGS)

test-slow: prepare ## Run the tests that take minutes: a million jobs, 1,512 orders of three sessions, a pg_cron that cannot connect
	@$(BIN)/pytest -m slow $(ARGS)

test-matrix: prepare ## Run the tests of the SQL on all versions; a part with CELLS="18x3.10.0 14"
	@$(BIN)/python -m scripts.matrix $(CELLS) -- $(ARGS)

EXAMPLES ?= 500
test-model: prepare ## Compare the SQL with the model of tests/model.py in other histories each time: EXAMPLES=500
	@MODEL_EXAMPLES=$(EXAMPLES) $(BIN)/pytest tests/test_model.py -s $(ARGS)

lint: prepare ## Check Python, SQL and shell
	@$(BIN)/python -m scripts.lint

migration: ## Assemble the next migration from sql/[0-9]*.sql
	@scripts/assemble-migration

release: ## Freeze the migration of this version
	@scripts/assemble-migration --release

bench: prepare ## Measure the cases of benchmarks/; a part with CASES="pickup retry_10k"
	@$(BIN)/python -m benchmarks $(ARGS) $(CASES)

bench-quick: prepare ## The same at a tenth of the size
	@$(BIN)/python -m benchmarks --quick $(ARGS) $(CASES)

bench-page: prepare ## Put the figures and plots of the last full run into docs/speed.md
	@$(BIN)/python -m benchmarks.page

cases: prepare ## Count the jobs of living workers that run twice, by case and product
	@$(BIN)/python -m tests.living_workers

chaos: prepare ## Half an hour of faults, and what must hold; shorter with ARGS="--minutes 5 --seed 2"
	@$(BIN)/python -m tests.chaos $(ARGS)

mutants: prepare ## Break the guards of the rescue one by one, and see a test fail for each; a part with GUARDS="Hold"
	@$(BIN)/python -m scripts.mutants $(GUARDS)

# PGXS comes with PostgreSQL and brings many targets of its own, so it is read for these three only.
ifneq ($(filter install uninstall installcheck,$(MAKECMDGOALS)),)
PG_CONFIG ?= pg_config
EXTENSION = procrastinate_stalled
DATA := $(shell scripts/extension-scripts)
$(if $(DATA),,$(error scripts/extension-scripts failed; its message is above))
REGRESS = procrastinate_stalled
REGRESS_OPTS = --inputdir=tests/installcheck --outputdir=build/installcheck
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# install: ## Install the extension into the PostgreSQL of PG_CONFIG=...
# uninstall: ## Remove it there again
# installcheck: ## Check the installed extension on a running server
# Its Python, which has Procrastinate's schema, is made ready unless another one is named.
export PYTHON ?= $(BIN)/python
installcheck: $(if $(filter $(BIN)/%,$(PYTHON)),prepare)
else

clean: ## Remove everything that the other targets made
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .matrix .bench build dist
	@find . -name __pycache__ -prune -exec rm -rf {} +
endif
