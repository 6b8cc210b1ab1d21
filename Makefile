# `make help` lists the goals; docs/install.md says what they need and what can go wrong.
.DEFAULT_GOAL := help

# Once there is an environment its own Python keeps it up to date: PYTHON= is needed only once.
PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo python3)
PORT ?= 5000
SERVE_PORT ?= 8000

# What `. .venv/bin/activate` does to PATH, for programs that start others by name, as DVC does.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

# MLflow's runner of LLM-scoring jobs is 8 more processes and 2 GB, for jobs we do not have.
ONLY_UI := MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=$${MLFLOW_DISABLE_TELEMETRY:-true}

PYTEST_OPTIONS := -n auto --maxprocesses 4 --dist loadfile

CACHES := .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dvc_plots
OUTPUTS := data/raw data/prepared models/*.safetensors models/*.onnx \
	reports/confusion reports/parity reports/predictions .checkpoints

.PHONY: help setup repro test test-lowest ui serve screenshots lock clean

help: ## List the goals.
	@echo 'Usage: make GOAL [PYTHON=python3.12] [TORCH_BACKEND=cpu]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

setup: ## Make or update .venv from requirements.lock.
	@$(PYTHON) scripts/setup_env.py

repro: setup ## Run the pipeline: download, prepare, train, evaluate, export, verify, register, report, sync.
	@$(IN_VENV) dvc repro
	@$(IN_VENV) mnist-bn sync
	@echo
	@echo 'Next:'
	@echo '  reports/index.html  the report, for any browser'
	@echo '  models/bn.onnx      the verified model'
	@echo '  make serve          the model over HTTP, and a page to draw digits for it'
	@echo '  make ui             the runs in MLflow'

test: setup ## Lint, check format, imports and types, run the tests.
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports
	.venv/bin/mypy
	$(IN_VENV) pytest $(PYTEST_OPTIONS)

test-lowest: setup ## Run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest.
	@$(PYTHON) scripts/setup_env.py --lowest
	PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" pytest $(PYTEST_OPTIONS)

ui: setup ## Show the runs in MLflow's UI on this machine (PORT=5000).
	@case "$$MLFLOW_TRACKING_URI" in http://* | https://*) \
		echo "MLFLOW_TRACKING_URI names a server, open it in a browser: $$MLFLOW_TRACKING_URI" ;; \
	*) \
		echo 'MLflow: http://127.0.0.1:$(PORT) (Ctrl-C stops it)'; \
		$(IN_VENV) $(ONLY_UI) mlflow ui --workers 1 --host 127.0.0.1 --port $(PORT) \
			--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" ;; \
	esac

serve: setup ## Serve the proven models on this machine (SERVE_PORT=8000).
	@$(IN_VENV) mnist-bn serve --port $(SERVE_PORT)

screenshots: setup ## Take the pictures of MLflow's UI and of the server's page in docs/images again (needs Chromium).
	@$(IN_VENV) python -m scripts.screenshots
	@$(IN_VENV) python -m scripts.page

lock: ## Resolve requirements.lock again after a change in pyproject.toml (UPGRADE=1: newest versions).
	@$(PYTHON) scripts/setup_env.py --lock $(if $(UPGRADE),--upgrade)

clean: ## Remove the environments, tools' caches and outputs that git does not hold; keep the DVC cache and MLflow's runs.
	rm -rf .venv .venv-lowest $(CACHES) $(OUTPUTS)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
