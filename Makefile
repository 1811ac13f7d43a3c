# make demo: set up .venv, train, sample and evaluate on digits.   make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKDIR ?= runs/digits
WORKERS ?= 2

.PHONY: demo test test-slow test-accelerator lint format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("jaxdiff needs Python >= 3.11, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/jaxdiff train --config configs/digits.py --workdir $(WORKDIR)
	$(BIN)/jaxdiff sample --workdir $(WORKDIR) --config.guidance.name=cfg --config.guidance.scale=1.2
	$(BIN)/jaxdiff eval --workdir $(WORKDIR)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not accelerator"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not accelerator"
	JAXDIFF_ACCELERATOR=cpu $(BIN)/python -m pytest -m accelerator tests/test_accelerator.py

# on a machine with a GPU or TPU, after installing the extra `cuda` or `tpu`
test-accelerator: $(STAMP)
	JAX_PLATFORMS= $(BIN)/python -m pytest -m accelerator tests/test_accelerator.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy jaxdiff
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .mypy_cache .import_linter_cache runs
