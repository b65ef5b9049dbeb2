# Two commands matter: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
TPU := .venv-tpu
BIN := $(VENV)/bin
SEED ?= 1
FAULTS ?= 40
BENCH ?=
# Test files run side by side: many wait for daemons most of the time. Threads that wait must not spin meanwhile.
TOGETHER ?= 3
XLA_TESTS := $(wildcard tests/test_*xla*.py)
TPU_TESTS := $(XLA_TESTS) $(wildcard $(patsubst %,tests/test_%*.py,storage object remote_archive mirror tpu))

.PHONY: demo test test-tpu check bench chaos cluster-up cluster-down install install-dev install-tpu

demo: install
	$(BIN)/python -m utils.sample_data data/demo
	$(BIN)/python jobs/launch.py --chain --file jobs/demo.yaml --cluster local

test: install-dev check
	$(BIN)/python -m tests.cluster install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(TOGETHER) --dist loadfile --no-loadscope-reorder
	$(MAKE) test-tpu TPU_TESTS="$(XLA_TESTS)" # the others have just run, in $(VENV)

test-tpu: $(TPU)/.installed-test # all of the TPU path, on XLA's CPU device
	PJRT_DEVICE=CPU OMP_WAIT_POLICY=PASSIVE $(TPU)/bin/python -m pytest -n 2 --dist loadfile $(TPU_TESTS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/mypy jobs ssl_train detect_train evaluate utils bench tests
	$(BIN)/lint-imports

bench: install-dev # all of bench/, or BENCH="augment archive"; tables are kept in bench/results/
	$(BIN)/python -m bench $(BENCH)

chaos: install-dev # FAULTS random kills on a chain, drawn from SEED; on two cores about half an hour
	$(BIN)/python -m tests.cluster install
	$(BIN)/python -m tests.chaos --seed $(SEED) --faults $(FAULTS)

cluster-up: install-dev
	$(BIN)/python -m tests.cluster up

cluster-down:
	$(BIN)/python -m tests.cluster down

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-tpu: $(TPU)/.installed

# Debian and Ubuntu leave out what a new environment needs; begun without it, it would be taken for whole next time.
$(VENV)/bin/python $(TPU)/bin/python:
	@$(PYTHON) -c 'import ensurepip' || { echo '$(PYTHON) makes no environments: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

$(VENV)/.installed: setup.py constraints.txt constraints-common.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: setup.py constraints.txt constraints-common.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

$(TPU)/.installed: setup.py constraints-tpu.txt constraints-common.txt | $(TPU)/bin/python
	$(TPU)/bin/pip install -q -c constraints-tpu.txt -e '.[tpu]'
	touch $@

$(TPU)/.installed-test: setup.py constraints-tpu.txt constraints-common.txt | $(TPU)/bin/python
	$(TPU)/bin/pip install -q -c constraints-tpu.txt -e '.[tpu,test]'
	touch $@ $(TPU)/.installed
