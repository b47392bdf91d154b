# `make demo` and `make test` set everything up themselves; needs python3 >= 3.10, pip and a C++20
# compiler. Set PYTHON to choose the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp)
FORMATTED := $(SOURCES) $(wildcard csrc/cuda/*.cu tests/emulation/*.h tests/emulation/*.cpp \
  tests/emulation/*.cu tests/emulation/*/*.h tests/emulation/*/*.cu)

.PHONY: setup demo test lint format wheel test-wheel bench clean

# A stamp, so that a second call costs nothing until dependencies or C++ change.
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("python >= 3.10 is needed, got " + sys.version.split()[0] \
	  + ": choose one with make PYTHON=...") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools cmake ninja torch
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[engines,dev]'
	@# The CUDA kernels are compiled in tests: by the machine's nvcc, else by PyPI's.
	command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || \
	  $(PIP) install nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* \
	    nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*
	touch $@

demo: setup
	$(BIN)/baton demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

test: lint
	$(BIN)/python -m pytest --durations=10

wheel: setup
	rm -rf dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# The same wheel file under the oldest pinned CPU torch and the newest CUDA torch (several GB).
test-wheel: wheel
	PYTHON=$(PYTHON) bash tests/wheel.sh dist/*.whl 2.13.0 2.14.1

bench: setup
	$(BIN)/python -m bench.relay --vs-generate

clean:
	rm -rf build dist demo $(VENV) baton_kernels/*.so *.egg-info
