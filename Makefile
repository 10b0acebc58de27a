# The two commands of a newcomer are `make demo` and `make test`; each builds the environment first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := 1

.PHONY: demo test lint env up down zoo lock clean

demo: env  ## the whole recipe on the built-in teacher, a report at the end
	vdmini run

test: env lint  ## all tests
	python -m pytest tests

lint: env  ## style, types, import directions
	ruff format --check .
	ruff check .
	mypy
	lint-imports

env: $(VENV)/.installed  ## the environment, from the lock

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

up: env  ## Prefect server and worker, MLflow server, on this machine only
	vdmini up

down:  ## stop what `make up` started
	vdmini down

zoo: env  ## train the built-in models from nothing
	vdmini zoo

lock:  ## write the versions of this environment to requirements.lock
	$(BIN)/python -m pip freeze --exclude-editable | sed "s/+cpu//" > requirements.lock

clean:  ## remove results, keep the environment
	rm -rf artifacts .scratch/checkpoints .scratch/tracking
