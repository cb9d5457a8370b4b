# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first; a second call is fast.
#   make demo PHOTOS=folder      your own photographs instead of the bundled ones
#   make demo ENCODER=dinov2-small   features of a vision transformer and a decoder trained for them; its weights come from
#                                the hub, or with WEIGHTS=file from a file; PHOTOS= goes with it
#   make demo TORCH=torch===2.13.0   the CUDA build of torch (=== takes the release without a local version)
PYTHON ?= python3
TORCH  ?= torch==2.13.0
PHOTOS ?=
ENCODER ?=
WEIGHTS ?=
BIN    := .venv/bin
comma  := ,
colon  := :
# Each encoder has a folder of its own, since a build keeps to its encoder.
DEMO   ?= runs/demo$(if $(ENCODER),-$(subst $(colon),-,$(notdir $(ENCODER))))

# The clustering is compiled once, here: the first build, and every process of the tests, would wait 25 s for it.
COMPILE := import numpy as np; \
	from hierarchy_builder import HierarchyRecipe, build_hierarchy; \
	features = np.random.default_rng(0).normal(size=(2, 16, 16, 8)).astype("float32"); \
	[build_hierarchy(features, recipe=recipe()) for recipe in (HierarchyRecipe.paper, HierarchyRecipe.stable)]

export RAY_USAGE_STATS_ENABLED = 0
export PYTHONUNBUFFERED = 1

.PHONY: help demo test test-cuda drill lint format bench results docs commands lock clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,5p' Makefile; echo; echo "targets: demo test test-cuda drill lint format bench results docs commands lock clean"

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first: a CPU build is taken where one is found, and the ranges in pyproject.toml then keep it.
.venv/.ready-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$(subst -,$(comma),$*)]"
	$(BIN)/python -c '$(COMPILE)'
	@touch $@

demo: .venv/.ready-demo
	$(BIN)/python examples/demo.py --out $(DEMO) $(if $(PHOTOS),--photos "$(PHOTOS)") \
		$(if $(ENCODER),--encoder "$(ENCODER)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

# Files in the order of their paths: those of whole processes, tests/end_to_end, come first, so that none is left alone.
test: .venv/.ready-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# On a machine with a GPU: what the suite, which keeps to the CPU, leaves out.
test-cuda: .venv/.ready-dev
	CUDA_TESTS=1 $(BIN)/python -m pytest -m cuda

drill: .venv/.ready-dev-neighbours
	$(BIN)/python -m pytest -m drill
	$(BIN)/python tests/drills/drill.py
	$(BIN)/python tests/drills/store_drill.py
	$(BIN)/python tests/drills/hostile_readers.py
	$(BIN)/python tests/drills/build_flips.py --flips 20000

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --warn-unused-ignores tests/typed_client.py examples/*.py
	$(BIN)/python -m benchmarks.records --check
	$(BIN)/python docs/write_commands.py --check
	$(BIN)/python docs/write_configuration.py --check

format: .venv/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready-dev
	$(BIN)/python -m benchmarks.builder.hierarchy
	$(BIN)/python -m benchmarks.trainer.train_step

# The tables of docs/results.md and README.md, from benchmarks/records; a benchmark writes its record with --record.
results: .venv/.ready-dev
	$(BIN)/python -m benchmarks.records

docs: .venv/.ready-docs
	$(BIN)/python docs/write_commands.py
	$(BIN)/python docs/write_configuration.py
	$(BIN)/mkdocs build --strict

# docs/commands.md and docs/configuration.md from the code; `make lint` fails where a page differs.
commands: .venv/.ready-dev
	$(BIN)/python docs/write_commands.py
	$(BIN)/python docs/write_configuration.py

# requirements.lock: the packages that `pip install .` needs, with versions and hashes (Python 3.11, Linux, CUDA build of torch).
# Use it as: pip install --require-hashes -r requirements.lock
lock: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --generate-hashes --no-emit-index-url --no-header --quiet \
		--python-version 3.11 --python-platform linux -o requirements.lock

clean:
	rm -rf .venv site build *.egg-info
