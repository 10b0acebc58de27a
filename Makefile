# The two commands of a newcomer are `make demo` and `make test`; each builds the environment first.
PYTHON ?= python3.11
VBENCH_PYTHON ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := 1

.PHONY: demo test lint env up down zoo vbench cluster lock clean

demo: env  ## the whole recipe on the built-in teacher, a report at the end
	vdmini run

test: env lint  ## all tests
	OMP_NUM_THREADS=1 python -m pytest tests -n 2 --dist loadfile

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

VBENCH_COMMIT := 45e79ec14e69a2187202c675d2dbce1a71843d53
vbench:  ## the official VBench in .vbench/, in an environment of its own (CUDA 12.1, Python 3.10)
	test -d .vbench/VBench || git clone https://github.com/Vchitect/VBench .vbench/VBench
	git -C .vbench/VBench checkout -q $(VBENCH_COMMIT)
	$(VBENCH_PYTHON) -m venv .vbench/venv
	.vbench/venv/bin/pip install -q torch torchvision --index-url https://download.pytorch.org/whl/cu121
	.vbench/venv/bin/pip install -q -r .vbench/VBench/requirements.txt
	.vbench/venv/bin/pip install -q --no-build-isolation git+https://github.com/facebookresearch/detectron2.git

lock:  ## write the versions of this environment to requirements.lock
	$(BIN)/python -m pip freeze --exclude-editable | sed "s/+cpu//" | grep -vxFf requirements-cluster.lock > requirements.lock

cluster: env  ## what benchmarks/cluster needs besides, from its lock
	$(BIN)/python -m pip install -q -r requirements-cluster.lock

clean:  ## remove results, keep the environment
	rm -rf artifacts .scratch/checkpoints .scratch/tracking
