# Every target makes .venv and installs the project first where that has not been done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo bench bench-quick reproduce test test-faults test-all-models quality style clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

bench-quick: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py --quick

# Images: make reproduce DATA_DIR=/path/to/folder-or-tar; further flags of the driver in FLAGS.
GRID ?= benchmarks/grids/$(if $(DATA_DIR),methods,digits).yaml
reproduce: $(INSTALLED)
	$(BIN)/python benchmarks/reproduce.py $(GRID) $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(FLAGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m faults

test-all-models: $(INSTALLED)
	$(BIN)/python -m pytest -m all_models

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $$($(PYTHON) --version) is too old: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
