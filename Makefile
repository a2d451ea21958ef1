# Every target sets up what it needs; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Processes that share the tests: one a core, at most eight; where ARGS names files, pytest's own alone, which has
# imported everything once before several have. A file's tests stay together, for they share fixtures and what was
# computed; files are begun in their order, which has short ones at its end.
WORKERS ?= $(if $(findstring .py,$(ARGS)),0,auto)

export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
# Where an environment forbids compiled files, each of the many processes that tests start would compile our modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test lint mutants fuzz docs docs-check clean

run: $(STAMP)
	$(BIN)/python -m experiments.run $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		$(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Changes that break the guarantee, one at a time: the short list, each against the tests that should notice it.
mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants --short $(ARGS)

# The site, in build/site; a link that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/python docs/site.py

# Every command of README and docs that needs nothing but up to so many minutes; `make test` runs those that take seconds.
MINUTES ?= 10
docs-check: $(STAMP)
	FEDSIM_DOCS_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/docs --timeout 0

# Every fuzzer, all at the same time, for so long: once a release. What they find is added to tests/reliability/fuzz_corpus.
SECONDS ?= 600
fuzz: $(STAMP)
	FEDSIM_FUZZ_SECONDS=$(SECONDS) FEDSIM_FUZZ_SEED=$$(date +%s) FEDSIM_FUZZ_KEEP=1 \
		$(BIN)/python -m pytest tests/reliability/test_fuzz.py -s --timeout 0

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedsim needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
