# make demo and make test each do all their own set-up: venv, install, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes with one thread each beat one process with two on small models.
JOBS ?= 2

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint format bench wheel-check schema clean help

help:
	@echo "make demo         run the whole embedded pipeline, into runs/demo"
	@echo "make test         run the tests"
	@echo "make lint         ruff, mypy --strict, schema in step with the code"
	@echo "make bench        benchmarks/, printed as tables"
	@echo "make wheel-check  build the wheel, install it in a clean venv, run it"

$(STAMP): pyproject.toml constraints.txt peers.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"dsteer needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r peers.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/dsteer run tiny --out runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/dsteer schema | cmp - pipelines/schema.json || (echo "run 'make schema'"; exit 1)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(STAMP)
	$(BIN)/dsteer schema > pipelines/schema.json

bench: $(STAMP)
	$(BIN)/python benchmarks/spectrum.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/guidance.py
	$(BIN)/python benchmarks/moments.py

wheel-check:
	bash .ci/wheel

clean:
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
