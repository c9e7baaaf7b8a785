# What to type, here: make help.
#
# Everything is made from Python >= 3.11 and make. Two environments: .venv, and .venv-ort-training for
# ONNX Runtime's training wheel, which cannot share one with stock onnxruntime. A stamp in each says
# that it is filled for the present pyproject.toml, so a second call starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TRAINING_PYTHON ?= $(PYTHON)
# Linux: only a CPU build can satisfy "+cpu", so gigabytes of CUDA cannot arrive by accident.
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
WORKERS ?= 2
PYTHONS ?= 3.12 3.13

VENV := .venv
BIN := $(VENV)/bin
TRAINING_VENV := .venv-ort-training
BASE := $(VENV)/.fedge-base
DEV := $(VENV)/.fedge-dev
TORCHED := $(VENV)/.fedge-torch
TRAINING := $(TRAINING_VENV)/.fedge-training

OUT ?= .
WIRE_PROTOS = $(shell cd proto && find fedge/wire -name '*.proto' | sort)
PROTOC = $(BIN)/python -m grpc_tools.protoc

# Our dependencies phone home unless told not to; fedge sets these itself, make sets them for pip and pytest.
export ORT_DISABLE_TELEMETRY := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-aarch64 test-pythons test-providers check lint format types layers proto proto-check docker-check docs-check bench operators notebooks clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BASE) $(TRAINING)  ## A real federation on this machine: a server and four hospitals (ARGS="--json")
	$(BIN)/fedge-server demo $(ARGS)

test: $(DEV) $(TORCHED) $(TRAINING)  ## All tests (ARGS="tests/fedge -k tensors", WORKERS=auto)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-aarch64: $(DEV) $(TORCHED)  ## Emulated Raspberry Pis join a real server (qemu-user-static, mmdebstrap)
	@tools/aarch64/test.sh $(BIN)/python $(ARGS)

test-pythons: $(DEV)  ## The client in the other Pythons installed here, with a device's packages
	@found=$$(tools/pythons.sh $(PYTHONS) | paste -sd :); \
	FEDGE_PYTHONS="$$found" $(BIN)/python -m pytest -n 0 tests/integration/test_pythons.py $(ARGS)

test-providers: $(DEV) $(TORCHED)  ## OpenVINO's onnxruntime against the CPU (half a gigabyte)
	@FEDGE_PROVIDER_PYTHON=$$(tools/provider_python.sh $(BIN)/python onnxruntime-openvino) \
	  $(BIN)/python -m pytest -n 0 tests/fedge/engines/test_providers.py $(ARGS)

.PHONY: soak
soak: $(DEV) $(TORCHED) $(TRAINING)  ## Long forms: 25,000 hostile bundles, all of the zoo, operators at ten points (ARGS="--cases 2000")
	@$(BIN)/python tests/soak/hostile.py $(ARGS)
	@FEDGE_SOAK=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/zoo tests/fedge/autodiff/test_coverage.py >&2
	@echo '{"row": "zoo with both exporters", "passed": true}'

check: lint types layers proto-check docker-check  ## Style, types, layers, generated code, Docker files

lint: $(DEV)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)  ## ruff: rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)  ## mypy, strict
	$(BIN)/mypy
	cd tools/aarch64 && ../../$(BIN)/mypy --config-file ../../pyproject.toml roots.py

layers: $(DEV)  ## import-linter: who may import whom
	$(BIN)/lint-imports

proto: $(DEV)  ## Regenerate Python from proto/ (OUT=folder)
	@$(PROTOC) -Iproto --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) $(WIRE_PROTOS)
	@$(PROTOC) -Ifedge/artifacts/onnx_v1=proto/fedge/onnx/v1 --python_out=$(OUT) --pyi_out=$(OUT) \
	  fedge/artifacts/onnx_v1/onnx.proto

proto-check: $(DEV)  ## Committed generated code is what proto/ says
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(MAKE) --no-print-directory proto OUT="$$tmp" >/dev/null; \
	find fedge -name '*_pb2*.py*' -not -path '*/__pycache__/*' | sort >"$$tmp/here"; \
	(cd "$$tmp" && find fedge -name '*_pb2*.py*' | sort) >"$$tmp/made"; \
	diff "$$tmp/here" "$$tmp/made" || { echo "generated files differ by name; run: make proto"; exit 1; }; \
	while read -r f; do \
	  cmp -s "$$f" "$$tmp/$$f" || { echo "$$f is not what proto/ says; run: make proto"; exit 1; }; \
	done <"$$tmp/made"; \
	echo "generated code agrees with proto/"

docker-check: $(DEV)  ## hadolint and the compose schema
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

bench: $(DEV) $(TORCHED) $(TRAINING)  ## List the benchmarks; run one with ARGS=step
	@if [ -n "$(ARGS)" ]; then $(BIN)/python benchmarks/$(ARGS).py; else \
	  for f in benchmarks/*.py; do n=$$(basename "$$f" .py); \
	    printf '  make bench ARGS=%-10s %s\n' "$$n" "$$(sed -n '1s/^"""//;1s/"""$$//;1p' "$$f")"; done; fi

operators: $(DEV)  ## Measure docs/operators.md again (with onnx-ad, if .cache/onnx-ad has it)
	$(BIN)/python -W ignore tools/operators.py --workers $(WORKERS)

notebooks: $(DEV) $(TORCHED) $(TRAINING)  ## Execute every notebook in simulations/ and write its outputs back
	@for f in simulations/*.ipynb; do echo "$$f"; \
	  $(BIN)/jupyter-execute --inplace "$$f"; done

clean:  ## Remove environments, caches and demo output
	rm -rf $(VENV) $(TRAINING_VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache fedge-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): pyproject.toml
	@tools/venv.sh "$(PYTHON)" $(VENV)
	@echo "filling $(VENV): what fedge needs (a minute, once)"
	@$(BIN)/pip install --quiet -e '.[server,sim]'
	@touch $@

$(DEV): $(BASE)
	@echo "filling $(VENV): what the checks need"
	@$(BIN)/pip install --quiet -e '.[server,sim,dev]'
	@touch $@

$(TORCHED): $(BASE) tools/torch.sh
	@tools/torch.sh $(BIN)/pip '$(TORCH)'
	@touch $@

$(TRAINING): pyproject.toml tools/training_venv.sh
	@tools/training_venv.sh "$(TRAINING_PYTHON)" $(TRAINING_VENV)
	@touch $@
