# make demo | test | lint | sanitize | bench | gpu | performance | clean
#   make test ARGS="-k norm"        passes ARGS on to the command
#   make PYTHON=python3.12 test     another interpreter (3.10 or later)

PYTHON ?= python3
ARGS ?=
OUT ?= out/gpu

VENV := .venv
BIN := $(VENV)/bin
# Names the interpreter's version, so that another PYTHON gets a fresh environment.
ENVIRONMENT := $(VENV)/.python-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
INSTALLED := $(VENV)/.installed
EMULATED := $(VENV)/.emulated
VISION := $(VENV)/vision
LINTERS := $(VENV)/.linters
BUILDERS := $(VENV)/.builders
# Folders are listed too: their times change when a file is removed.
SOURCES := CMakeLists.txt LICENSE README.md pyproject.toml \
  $(shell find cmake csrc python -name __pycache__ -prune -o -print)
CPP_SOURCES = $(shell find csrc tests/sanitize -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# pip gives the build an environment of its own, with the pinned tools and without torch.
export PIP_BUILD_CONSTRAINT := $(abspath constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The GPUs that kernels are compiled for while developing; a release is built without this, for all of them.
export CUDAARCHS ?= 80-real;90-real

.PHONY: demo test lint sanitize bench gpu performance clean

demo: $(INSTALLED)
	$(BIN)/python -m steadygrad study --quick --out out/demo $(ARGS)

test: $(INSTALLED) $(EMULATED) $(VISION)/.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

# The CPU backend and the emulated CUDA backend under ASan and UBSan, then under TSan; without Python and torch.
sanitize: $(BUILDERS)
	for sanitizer in address thread; do \
	  $(BIN)/cmake -S tests/sanitize -B build/sanitize/$$sanitizer -G Ninja \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSANITIZER=$$sanitizer && \
	  $(BIN)/cmake --build build/sanitize/$$sanitizer --target check || exit 1; \
	done

bench: $(INSTALLED)
	$(BIN)/python -m steadygrad bench $(ARGS)

# Builds, tests and measures on a GPU, with the packages that are there; ARGS=--rehearse needs none.
gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu.py --out "$(OUT)" $(ARGS)

performance: $(INSTALLED)
	$(BIN)/python benchmarks/performance.py

clean:
	rm -rf $(VENV) build dist out .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "steadygrad needs Python 3.10 or later: install it, or name it with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(INSTALLED): $(ENVIRONMENT) constraints.txt $(SOURCES)
	$(BIN)/python -m pip install -c constraints.txt '.[test]'
	touch $@

# For the tests alone: the CUDA kernels on the CPU.
$(EMULATED): $(INSTALLED) $(shell find tests/emulated -name __pycache__ -prune -o -print)
	$(BIN)/python -m pip install --no-deps ./tests/emulated
	touch $@

# For the tests of timm alone. Beside the environment: where the default torchvision, which is built for CUDA, does not
# go with the torch that is there, whatever finds it fails.
$(VISION)/.installed: $(ENVIRONMENT) constraints.txt
	rm -rf $(VISION)
	$(BIN)/python -m pip install --no-deps --target $(VISION) -c constraints.txt timm torchvision
	touch $@

$(LINTERS): $(ENVIRONMENT) constraints.txt
	$(BIN)/python -m pip install -c constraints.txt ruff mypy clang-format
	touch $@

$(BUILDERS): $(ENVIRONMENT) constraints.txt
	$(BIN)/python -m pip install -c constraints.txt cmake ninja
	touch $@
