# make demo   sets up, runs the whole chain on a real small model, and verifies the models that it made
# make test   sets up and runs the lean test suite
# make check  lint, format and types
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-all check setup
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/sdft run configs/recipes/demo.yaml --html artifacts/demo.html
	@$(BIN)/sdft verify configs/recipes/demo.yaml

test: $(STAMP)
	@echo "Testing: the lean suite, one Ray and one vLLM engine; make test-all has the rest."
	@$(BIN)/python -m pytest -m "not full"

test-all: $(STAMP)
	@$(BIN)/python -m pytest

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup: $(STAMP)

# The stamp holds once everything is installed; a changed lock or pyproject.toml sets up again.
$(STAMP): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11. Do: make PYTHON=python3.11"; exit 1; }
	@echo "Setting up .venv: $$(grep -c == requirements/cpu.txt) packages, about 1.2 GB to download; 2 minutes where they are cached."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt 2> .venv/pip.log || { \
	  echo "Trying once more with PyTorch's index of CPU builds."; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) -r requirements/cpu.txt; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@echo "Set up."
