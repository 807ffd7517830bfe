# Every target makes .venv and installs the project first where that has not been done.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
SCRIPTS := Scripts
else
PYTHON ?= python3
SCRIPTS := bin
endif
VENV := .venv
BIN := $(VENV)/$(SCRIPTS)
INSTALLED := $(VENV)/.installed

.PHONY: demo bench bench-quick bench-scale reproduce gpu-check test test-slow test-all timm-tests test-oldest test-newest \
	release quality style docs clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

bench-quick: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py --quick

bench-scale: $(INSTALLED)
	$(BIN)/python benchmarks/bench_scale.py

# Images: make reproduce DATA_DIR=/path/to/folder-or-tar; further flags of the driver in FLAGS.
GRID ?= benchmarks/grids/$(if $(DATA_DIR),methods,digits).yaml
reproduce: $(INSTALLED)
	$(BIN)/python benchmarks/reproduce.py $(GRID) $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(FLAGS)

# All that needs a GPU, in less than 15 minutes: make gpu-check DATA_DIR=/path/to/tin100. See benchmarks/gpu.sh.
gpu-check: $(INSTALLED)
	PYTHON=$(BIN)/python benchmarks/gpu.sh $(DATA_DIR)

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

# The oldest release of everything that pyproject.toml allows, in an environment of its own. What those warn of is theirs.
OLDEST := .venv-oldest/$(SCRIPTS)
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet uv
	$(OLDEST)/uv pip compile --quiet --python $(OLDEST)/python --resolution lowest-direct pyproject.toml \
		--output-file .venv-oldest/oldest.txt
	$(OLDEST)/uv pip install --quiet --python $(OLDEST)/python --constraint .venv-oldest/oldest.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n $(WORKERS) --dist loadfile -W default

# The newest release of everything, pre-releases too: first what has changed in timm, then the tests.
NEWEST := .venv-newest/$(SCRIPTS)
test-newest:
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --pre --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(NEWEST)/python tests/newest_timm.py
	OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest -n $(WORKERS) --dist loadfile

# dist/: what goes to PyPI, looked over, and the wheel tried where nothing else is.
RELEASE := .venv-release/$(SCRIPTS)
release: quality
	rm -rf dist .venv-release
	$(PYTHON) -m venv .venv-release
	$(RELEASE)/python -m pip install --quiet build twine
	$(RELEASE)/python -m build
	$(RELEASE)/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv-release
	$(RELEASE)/python -m pip install --quiet dist/*.whl
	$(RELEASE)/python tests/try_installed.py

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
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-release build dist *.egg-info

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $$($(PYTHON) --version) is too old: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
