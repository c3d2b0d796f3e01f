# Every target makes .venv and installs what it needs when missing. Needs Python >= 3.10 and a C++ compiler;
# make PYTHON=python3.12 setup takes another Python, PTV2_CPP=0 make setup leaves the C++ kernels out.
PYTHON ?= python3
# Processes of make test, each of some 1.3 GB with one thread (and for the C++ kernels a second, which must not
# wait by spinning). They start dozens of others, which need not compile our modules anew.
WORKERS ?= 2
BIN := .venv/bin
CPP := $(wildcard csrc/*)
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=
GPU_RESULTS ?= bench/results/gpu-cuda

.PHONY: setup demo test test-slow test-oldest sanitize lint check-resolution docs docs-serve model-table bench \
        bench-gpu clean

setup: .venv/installed

.venv/installed: .ci/setup pyproject.toml constraints.txt setup.py $(CPP)
	PYTHON=$(PYTHON) .ci/setup .venv constraints.txt

demo: .venv/installed
	$(BIN)/python -m ptv2_fast.training.demo --output runs/demo

test: .venv/installed
	$(THREADS) $(BIN)/python $(PYTEST)

test-slow: .venv/installed build/checkpoints
	$(BIN)/python -m pytest -m slow

# Small checkpoints inside packages, as files alone: one of the packages brings a module "tests".
build/checkpoints: | .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ sapiens==1.0.5 rxnmapper==0.4.3

# The suite on the lowest versions that pyproject.toml admits, in an environment of its own. It builds the
# extension with them; that one runs with the versions of .venv, too.
test-oldest: .venv-oldest/installed
	$(THREADS) .venv-oldest/bin/python $(PYTEST)

.venv-oldest/installed: .ci/setup pyproject.toml constraints-oldest.txt setup.py $(CPP)
	PYTHON=$(PYTHON) .ci/setup .venv-oldest constraints-oldest.txt

# AddressSanitizer, UBSan and ThreadSanitizer over random cases at every CPU level; no torch inside.
sanitize: .venv/installed
	$(BIN)/python -m pytest -m slow -k sanitizer tests/test_kernel_runner.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	.ci/check-resolution

# What setup installs, resolved for every Python and platform from the package index alone; needs it.
check-resolution: .venv/installed
	.ci/check-resolution

# The site of docs/ in build/site; every warning (a link without a target, say) is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The table of encoders in docs/support.md, between its two marks.
model-table: .venv/installed
	mkdir -p build
	$(BIN)/ptv2-fast models --markdown > build/models.md
	sed -i -e '/^<!-- models/,/^<!-- end/{/^<!--/!d}' -e '/^<!-- models/r build/models.md' docs/support.md

bench: .venv/installed
	$(BIN)/python -m bench.bench_attention
	$(BIN)/python -m bench.bench_micro
	$(BIN)/python -m bench.bench_training_step
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.documented

# Each stage ends after less than nine minutes; the same command goes on with what is left.
bench-gpu: .venv/installed
	$(BIN)/python -m bench.gpu check attention elementwise step memory tune --output $(GPU_RESULTS)
	$(BIN)/python -m bench.plot

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info ptv2_fast/*.so
