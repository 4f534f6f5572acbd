# Everything runs in .venv/; the two commands of the README are `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of a newer torch comes from an index of its own (docs/adapters.md); this one from the usual one.
TORCH ?= torch==2.13.0
# ggml's own thread pool is as fast as OpenMP's alone and suffers less where cores are shared; llava is not needed.
export CMAKE_ARGS ?= -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF

.PHONY: demo test check bench docs format clean

demo: .venv/device
	$(BIN)/skerry demo

test: .venv/dev
	$(BIN)/pytest

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.platforms

bench: .venv/device
	$(BIN)/skerry bench all

docs: .venv/dev
	$(BIN)/python -m tools.docs --write

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/device: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Skerry needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing. llama.cpp is compiled for this machine the first time: 5 to 15 minutes on two cores."
	$(BIN)/pip install --quiet --editable '.[server]'
	touch $@

.venv/dev: .venv/device
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev,server,eval,train,onnx,export]'
	tests/install_mosquitto
	tests/install_flower
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
