SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(wildcard proto/cbp_proto/v1/*.proto)
DEMO_DIR ?= demo-output
KILLS ?= 200
EXPERIMENTS_DIR ?= experiments-output
DEVICE ?= cpu

.PHONY: help install demo test torture check format serve proto bench bench-durability compare-methods forgetting reproduce-quick reproduce clean

help: ## show these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20

.venv/installed: constraints.txt proto/pyproject.toml cbp/pyproject.toml server/pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt \
		-e proto -e cbp -e 'server[postgresql,s3]' -e 'client[files,demo]'
	@touch $@

install: .venv/installed ## create .venv with everything the project needs

demo: .venv/installed ## stream digits to three learners and plot who keeps learning (about a minute)
	$(BIN)/cbp demo --output $(DEMO_DIR)

test: .venv/installed ## run the tests, four at a time (most of them wait for servers; about thirteen minutes on two cores)
	$(BIN)/pytest -n 4 --dist worksteal

torture: .venv/installed ## the longer tests: kills at every point, power losses, then KILLS kills at random (an hour; SEED=n repeats, POWER=1 cuts the power)
	$(BIN)/pytest -m torture
	PYTHONPATH=tests $(BIN)/python tests/torture.py --kills $(KILLS) $(if $(SEED),--seed $(SEED)) $(if $(POWER),--power)

check: .venv/installed ## format, lint, types, walls between packages, proto drift, Dockerfile, proto style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/hadolint Dockerfile
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code

format: .venv/installed ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cd proto && ../$(BIN)/buf format --write

serve: .venv/installed ## run a server on 127.0.0.1:50051 (gRPC) and :8080 (HTTP), state in ./data
	$(BIN)/cbp-server --data-dir data

proto: .venv/installed ## regenerate proto/cbp_proto/v1/*_pb2*
	$(BIN)/python tools/generate_protos.py

bench: .venv/installed ## measure the claims of docs/benchmarks.md and print their tables (less than ten minutes)
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/stacked_steps.py
	$(BIN)/python benchmarks/plasticity_samples.py
	$(BIN)/python benchmarks/service_throughput.py
	$(BIN)/python benchmarks/service_latency.py
	$(BIN)/python benchmarks/many_learners.py
	$(BIN)/python benchmarks/server_start.py
	$(BIN)/python benchmarks/gpu_steps.py

bench-durability: .venv/installed ## what the journal and checkpoints cost, and how fast a journal is learnt again (eight minutes)
	$(BIN)/python benchmarks/durability.py

compare-methods: .venv/installed ## all methods of docs/methods.md on one stream: table and picture (seven minutes on two cores)
	$(BIN)/python -m experiments.methods compare --output $(EXPERIMENTS_DIR)/methods

forgetting: .venv/installed ## the table of docs/forgetting.md (a minute and a half on two idle cores)
	$(BIN)/python -m experiments forgetting --document docs/forgetting.md

reproduce-quick: PROTOCOL := quick
reproduce-quick: .venv/installed ## every finding of docs/paper.md at reduced size, and one experiment over gRPC (less than 15 minutes on two cores)
	$(REPRODUCE)

reproduce: PROTOCOL := full
reproduce: .venv/installed ## the full protocol (days on two cores); it says first how long it will take here, and goes on where it was stopped (DEVICE=cuda, CBP_MNIST=directory)
	$(BIN)/python -m experiments plan --protocol full --device $(DEVICE)
	$(REPRODUCE)

define REPRODUCE
$(BIN)/python -m experiments run --protocol $(PROTOCOL) --output $(EXPERIMENTS_DIR) --device $(DEVICE)
$(BIN)/python -m experiments collect --protocol $(PROTOCOL) --output $(EXPERIMENTS_DIR)
$(BIN)/python -m experiments report --protocol $(PROTOCOL) --results $(EXPERIMENTS_DIR)
$(BIN)/python -m experiments service --output $(EXPERIMENTS_DIR)
endef

clean: ## remove the environment and what tools left behind
	rm -rf .venv demo-output experiments-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
