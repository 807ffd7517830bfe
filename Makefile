# Every target makes .venv and installs the project first where that has not been done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo bench bench-quick reproduce test test-slow test-all timm-tests test-newest quality style docs clean

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

# Tests run on WORKERS cores, each in one thread. test takes some 4 minutes on two, test-slow (what test leaves out) up to
# 12; test-all is everything, every model of timm included, an hour or so.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: $(INSTALLED)
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not exhaustive'

test-all: $(INSTALLED)
	$(PYTEST) -m ''

# timm's own tests of its scripts, downloaded, with these scripts in their place.
timm-tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/timm_tests.py

# The newest release of everything, in an environment of its own: first what has changed in timm, then the tests.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/python tests/newest_timm.py
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(WORKERS) --dist loadfile

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/flags.md, of the parsers.
docs: $(INSTALLED)
	$(BIN)/python docs/make_flags.py

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $$($(PYTHON) --version) is too old: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
