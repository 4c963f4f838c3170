# make demo | examples | test | test-all | fuzz | integration | bench | table | capabilities | cells
#      build | wheel | sanitize | lint | clean
#
# Each target sets up all it needs: an environment .venv where none is active, torch where none is
# installed, the package and its tools, the C++ kernels where there is a C++ compiler (CXX), and the
# CUDA kernels where there is nvcc (NVCC). An active environment is used, and its torch kept. PYTHON is
# the Python that makes .venv, once; make clean removes it.
#
#   make demo ARGS="--cell lstm --steps 200"
#   make examples ARGS="--only char_lm word_lm"
#   make test ARGS="-k gru"
#   make fuzz MINUTES=300 BACKEND="native numba"
#   make fuzz BACKEND=native SEED=387
#   make bench WORKLOADS="small* ptb-medium" THREADS=1 ROUNDS=20 SECONDS=4 BACKENDS="numba eager"
#   make bench PEERS="onnxruntime openvino jax"
#   make gpu STAGES="smoke test" MINUTES=8 WORKLOADS="rl-* long-*" OUT=out/gpu PYTHON=/path/to/python3
#   make table RESULTS=bench/results/<machine>/<file>.json

PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo examples test test-all fuzz integration bench gpu table capabilities cells build wheel \
  sanitize lint format clean

# Where .venv is, or will be, unless an environment is active.
RUN = "$$($(PYTHON) tools/prepare.py --python)"

help:
	@echo "make demo      train a small language model with torch.nn and with fastseq, side by side"
	@echo "make examples  every example in its short form, some minutes; ARGS=\"--only tag\" runs one,"
	@echo "               ARGS=--write writes docs/examples.md from what they print"
	@echo "make test      the tests"
	@echo "make test-all  the tests in their long form, which asks each example's short form to learn, and a"
	@echo "               short run of the benchmarks"
	@echo "make fuzz      random problems of every backend, an hour; MINUTES and BACKEND narrow it,"
	@echo "               SEED runs one again"
	@echo "make integration  other libraries with fastseq's layers, Captum to torchrl; installs them"
	@echo "make bench     the benchmarks; WORKLOADS, THREADS, ROUNDS, SECONDS, BACKENDS narrow them;"
	@echo "               PEERS=all, or names, installs other libraries and times them beside"
	@echo "make gpu       on a GPU, with no network: smoke, build, core, test, bench, sanitize; STAGES,"
	@echo "               MINUTES (for all of it) and WORKLOADS narrow it, OUT takes its files"
	@echo "make table     write the tables and the picture of the README and the docs from the results"
	@echo "make capabilities  ask torch.nn and fastseq what works, and write docs/capabilities.md"
	@echo "make cells     write docs/cells.md from the cells' declarations and the backends' word"
	@echo "make build     the C++ and CUDA kernels, which every target builds where they are old"
	@echo "make wheel     one wheel for every Python from 3.10 and every torch from 2.10, in dist"
	@echo "make sanitize  the C++ and CUDA kernels under the address, undefined and thread sanitizers"
	@echo "make lint      ruff and mypy"
	@echo "make format    ruff's formatter and its fixes"
	@echo "make clean     remove what the others made, .venv too"

setup:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no $(PYTHON) here; name a Python of 3.10 or newer: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@$(PYTHON) tools/prepare.py

demo: setup
	@$(RUN) examples/char_lm.py $(ARGS)

examples: setup
	@$(RUN) tools/examples.py $(ARGS)

test: setup
	@$(RUN) -m pytest -n 2 -q tests $(ARGS)

test-all: setup
	@$(RUN) -m pytest -n 2 -q --full tests $(ARGS)
	@$(RUN) -m bench --workloads "tiny-*" --seconds 0.2 --results out/bench

fuzz: setup
	@$(RUN) tests/helpers/fuzz.py $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(BACKEND),--backend $(BACKEND)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# The torch that is there is named, so that pip keeps it.
integration: setup
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -e ".[integration]" "torch==$$($(RUN) -c 'import torch; print(torch.__version__)')"
	@$(RUN) -m pytest -q tests/test_integrations.py $(ARGS)

bench: setup
	@$(if $(PEERS),$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -e ".[peers]" "torch==$$($(RUN) -c 'import torch; print(torch.__version__)')")
	@$(RUN) -m bench $(if $(WORKLOADS),--workloads "$(WORKLOADS)") $(if $(THREADS),--threads $(THREADS)) \
	  $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(LIMIT),--limit $(LIMIT)) $(if $(BACKENDS),--backends "$(BACKENDS)") \
	  $(if $(PEERS),--peers "$(PEERS)") $(ARGS)
	$(if $(WORKLOADS),,@$(RUN) -m bench.loops $(if $(THREADS),--threads $(THREADS)))

# With the Python that is there, which has torch and Triton: a machine with a GPU may have no network.
gpu:
	@$(PYTHON) -m bench.gpu $(if $(STAGES),--stages "$(STAGES)") $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(WORKLOADS),--workloads "$(WORKLOADS)") $(if $(OUT),--out "$(OUT)") $(ARGS)

table: setup
	@$(RUN) -m bench.table --write $(RESULTS)
	@$(RUN) -m bench.plot --out docs/speed.png $(RESULTS)
	@$(RUN) -m bench.aims --write $(RESULTS)
	@$(RUN) -m bench.rule --gpu

capabilities: setup
	@$(RUN) -m bench.capabilities --write $(ARGS)

cells: setup
	@$(RUN) -m bench.cells --write

build: setup

# What an earlier build left in build/lib would get into the wheel.
wheel: setup
	@rm -rf build/lib* build/bdist* dist
	@$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir dist .
	@$(RUN) tools/one_binary.py dist/*.whl

sanitize: setup
	@$(RUN) tools/sanitize.py $(ARGS)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: setup
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastseq/_cpu.abi3.so fastseq/_cpu.txt fastseq/_cuda.abi3.so fastseq/_cuda.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
