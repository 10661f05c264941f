# Every target is complete in itself: it first installs what is missing (scripts/prepare).
BIN = .venv/bin
MIGRATION = sql/migrations/procrastinate_stalled_0001_initial.sql

.PHONY: help prepare demo test lint migration bench cases clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

prepare: ## Install what is missing: PostgreSQL, pg_cron, .venv
	@scripts/prepare

demo: prepare ## Lose a worker to SIGKILL and see its job rescued by PostgreSQL itself
	@$(BIN)/python -m demo

test: prepare ## Run the tests; a part of them with ARGS="-k queueing_lock"
	@$(BIN)/pytest -n 4 --dist worksteal $(ARGS)

lint: prepare ## Check Python, SQL and shell
	@$(BIN)/python -m scripts.lint

migration: ## Assemble the migration from sql/[0-9]*.sql
	@cat sql/[0-9]*.sql > $(MIGRATION)

bench: prepare ## Compare with Procrastinate's documented way
	@$(BIN)/python -m benchmarks

cases: prepare ## Count the jobs of living workers that run twice, by case and product
	@$(BIN)/python -m tests.living_workers

clean: ## Remove everything that the other targets made
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -prune -exec rm -rf {} +
