# The project's own commands; `make help` lists them.
PYTHON ?= python3
# Which DALI, by CUDA version: cuda12 or cuda13.
DALI ?= cuda12
ARGS ?=
# For the interpreter, where torch is a CPU build; a CUDA build has brought the one that it wants.
TRITON := triton==3.9.0
NODES ?=
HOSTFILE ?=
LOCAL ?=
VENV := .venv
PEERS := .venv-peers
C_FILES := $(wildcard pipelines/formats/packed/*.c)
TRAINER := cosmoflow_dali.train
ifneq ($(NODES),)
TRAINER := cosmoflow_dali.launch --nodes $(NODES) $(if $(HOSTFILE),--hostfile $(HOSTFILE)) $(if $(LOCAL),--local) --
endif
RUN := $(VENV)/bin/python
# A process a core, each with whole test modules, so that what a module's tests share is made once.
PYTEST := $(RUN) -m pytest --numprocesses auto --dist loadfile

.PHONY: help setup train test test-rest test-all peers peers-remote kernels gpu-check lint lint-python lint-generated lint-c lint-scripts docs image clean

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.done ## Make the virtual environment in .venv with every pinned dependency.

$(VENV)/.done: pyproject.toml constraints.txt $(C_FILES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch==2.13.0
	find pipelines -name "*.so" -delete
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$(DALI),mpi,trackers,cloud,dev]'
	$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet $(TRITON)
	touch $@

train: setup ## Train; ARGS="--config configs/NAME.yaml ..." changes what, NODES=16 where (HOSTFILE=FILE, LOCAL=1).
	$(RUN) -m $(TRAINER) $(ARGS)

test: setup ## Run the tests that need no GPU, no SLURM and little time.
	$(PYTEST) -m "not gpu and not slurm and not slow" $(ARGS)

test-rest: setup ## Run the tests that make test leaves out; those without their hardware are skipped.
	$(PYTEST) -m "gpu or slurm or slow" $(ARGS)

test-all: test test-rest ## Run all tests.

peers: $(PEERS)/.done ## Compare the loader with those of other projects, which are installed in .venv-peers.
	$(PEERS)/bin/python -W ignore benchmarks/peers_bench.py $(ARGS)

peers-remote: $(PEERS)/.done ## The same from an object store on this machine, whose answers are delayed.
	$(PEERS)/bin/python -W ignore benchmarks/remote_bench.py $(ARGS)

$(PEERS)/.done: benchmarks/peers.txt $(VENV)/.done
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	touch $@

kernels: setup ## Compile every Triton kernel for GPUs, without one, and model the time of a training step.
	$(RUN) -W ignore benchmarks/kernel_report.py $(ARGS)

gpu-check: ## Check a GPU with the Python that is there, without a set-up, in eight minutes.
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: lint-python lint-generated lint-c lint-scripts ## Check Python, imports, generated files, C, scripts and the Dockerfile.

lint-python: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache --no-logo

lint-generated: setup
	$(RUN) docs/import_graph.py --check
	$(RUN) docs/settings.py --check

lint-c:
	if command -v $(CC) >/dev/null; then $(CC) -std=c11 -Wall -Wextra -Wpedantic -Werror -fsyntax-only $(C_FILES); \
	else echo "C files are not checked: there is no C compiler"; fi

lint-scripts: setup
	$(VENV)/bin/shellcheck --external-sources *.sub *.sh .ci/run configs/*.sh
	$(VENV)/bin/hadolint Dockerfile

docs: $(VENV)/.docs ## Build the documentation, with its API pages, into site/.
	NO_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs build --quiet

$(VENV)/.docs: $(VENV)/.done
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

image: ## Build the container image cosmoflow-dali, on NVIDIA's PyTorch image.
	docker build --tag cosmoflow-dali .

clean: ## Remove what the tools made; data/ and runs/ stay.
	rm -rf $(VENV) $(PEERS) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
