# Two commands set everything up from a fresh clone: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
PIP_FLAGS = --quiet --disable-pip-version-check

.PHONY: train test lint parity model experts study clean

train: $(VENV)/.installed
	$(VENV)/bin/python train.py --config configs/tiny.py $(ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Compares with PyTorch and transformers live; needs an environment with PyTorch's CPU build.
parity: $(PARITY_VENV)/.installed
	$(PARITY_VENV)/bin/python -m pytest -m parity $(ARGS)

# Pretrains the built-in model again.
model: $(VENV)/.installed
	$(VENV)/bin/python -m grpocem_jax.builtin.pretrain

# Trains the experts that come with the built-in model again.
experts: $(VENV)/.installed
	$(VENV)/bin/python -m grpocem_jax.experts --config configs/tiny.py --workdir runs/experts \
	    --config.train.epochs=2 --config.train.max_steps=125
	rm -rf grpocem_jax/builtin/experts
	cp -r runs/experts/library grpocem_jax/builtin/experts

# Makes the figures of docs/adaptation.md again.
study: $(VENV)/.installed
	$(VENV)/bin/python -m studies.adaptation --doc docs/adaptation.md

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) -r requirements.lock
	$(VENV)/bin/pip install $(PIP_FLAGS) --no-deps -e .
	touch $@

$(PARITY_VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install $(PIP_FLAGS) -r requirements.lock torch==2.13.0
	$(PARITY_VENV)/bin/pip install $(PIP_FLAGS) --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) build dist *.egg-info
