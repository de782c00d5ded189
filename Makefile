# make demo | test | test-real | test-msl | real-models | lint | clean
# PYTHON=python3.12 and EXTRA=cuda13 choose others; WORKERS=1 runs tests one after another.
# The stamp is per EXTRA, but cpu and cuda13 cannot share .venv: `make clean` between them.
PYTHON ?= python3
WORKERS ?= auto
EXTRA ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
BIN := .venv/bin
comma := ,

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

DEMO := .venv/installed-demo-$(EXTRA)
DEV := .venv/installed-dev-$(EXTRA)
NATIVE := $(wildcard native/*.* native/*/*.*)
CXX_FILES := $(filter %.cpp %.h,$(NATIVE)) $(wildcard tests/msl/runtime/*)
# Neighbours stay with one worker, which makes their fixtures once; whoever is done first helps.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal

.PHONY: demo test test-real test-msl real-models lint clean
.NOTPARALLEL:

demo: $(DEMO)
	$(BIN)/leankv demo

# Tests with a real model skip where it cannot be had.
test: lint
	@$(BIN)/python tests/real_models.py smollm2 || true
	$(PYTEST)

# Those that need all of the real models, or long.
test-real: $(DEV) real-models
	$(BIN)/python -m pytest -m real

# The GPU kernels on the CPU, under the checker: those parts of `make test` alone.
test-msl: $(DEV)
	$(PYTEST) tests/msl tests/kernels -k msl

# Three trained models, 820 MB, into .venv/models or the folder that LEANKV_MODELS names.
real-models: .venv/created
	@$(BIN)/python tests/real_models.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

clean:
	rm -rf .venv build dist leankv_mlx/*.so .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(DEMO): EXTRAS = $(if $(EXTRA),[$(EXTRA)])
$(DEV): EXTRAS = [$(if $(EXTRA),$(EXTRA)$(comma))dev]
$(DEMO) $(DEV): .venv/created pyproject.toml hatch_build.py CMakeLists.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable '.$(EXTRAS)'
	@touch $@

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'Python 3.11 or newer is needed; name one with: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@
