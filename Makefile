# make demo | test | lint | bench | clean
#   make test ARGS="-k norm"        passes ARGS on to the command
#   make PYTHON=python3.12 test     another interpreter (3.10 or later)

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Names the interpreter's version, so that another PYTHON gets a fresh environment.
ENVIRONMENT := $(VENV)/.python-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
# Folders are listed too: their times change when a file is removed.
SOURCES := CMakeLists.txt LICENSE README.md pyproject.toml \
  $(shell find cmake csrc python -name __pycache__ -prune -o -print)
CPP_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# pip gives the build an environment of its own, with the pinned tools and without torch.
export PIP_BUILD_CONSTRAINT := $(abspath constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/python -m steadygrad study --quick --out out $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

bench: $(INSTALLED)
	$(BIN)/python -m steadygrad bench $(ARGS)

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

$(LINTERS): $(ENVIRONMENT) constraints.txt
	$(BIN)/python -m pip install -c constraints.txt ruff mypy clang-format
	touch $@
