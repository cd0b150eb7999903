# Two commands for a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BIN := $(VENV)/bin
# A folder `kernels/` in the current directory must not shadow the package of that name (diffusers imports it).
export PYTHONSAFEPATH = 1

.PHONY: demo test lint bench study clean

demo: $(VENV)/eval.done
	$(BIN)/quantdit calibrate --model fashion-dit --bits w4a8 --output $(OUT)/fashion-dit-w4a8 --overwrite
	$(BIN)/quantdit inspect $(OUT)/fashion-dit-w4a8 --plot $(OUT)/fashion-dit-w4a8-layers.png
	$(BIN)/quantdit evaluate fashion-dit $(OUT)/fashion-dit-w4a8 --samples 64 --output $(OUT)/fashion-dit-w4a8-drift

test: $(VENV)/test.done
	$(BIN)/python -m pytest

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/test.done
	$(BIN)/python -m quantdit.bench --output reports/bench/cpu-linear.jsonl

study: $(VENV)/eval.done
	$(BIN)/python reports/fashion_dit.py

clean:
	rm -rf $(VENV) $(OUT)

# constraints.txt pins torch to the CPU build that development uses; set CONSTRAINTS= to install the newest of everything.
CONSTRAINTS ?= -c constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/eval.done: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[eval,plot]'
	touch $@

$(VENV)/test.done: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[eval,plot,test]'
	touch $@
