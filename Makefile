PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

.PHONY: quickstart test test-oldest test-newest test-vllm lint docs clean

# The whole path on real text, in minutes on a CPU.
quickstart: $(READY)
	$(BIN)/qsparse quickstart --output quickstart

# Kernels in Triton's interpreter are thousands of small calls, each of which coverage would trace: twice the time.
test: $(READY)
	$(PYTEST) -m "not interpreted" --cov --cov-report term:skip-covered
	$(PYTEST) -m interpreted

# What must hold on every Transformers that pip may choose.
test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest --numprocesses auto --maxprocesses 4 tests/test_transformers.py

# That servers give what we generate: minutes, and an environment of gigabytes, so it is no part of the others.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/test_serving.py tests/test_vllm.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

# The pages; a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . docs/_build
	cp docs/_build/README.html docs/_build/index.html

# The environments; made anew when their description changes.
$(READY): pyproject.toml constraints/pinned.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints/pinned.txt --editable ".[dev]"
	touch $(READY)

.venv-%/.ready: pyproject.toml constraints/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints/$*.txt --editable ".[test]"
	touch $@

.venv-vllm/.ready: pyproject.toml constraints/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement constraints/vllm.txt --editable .
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm docs/_build quickstart runs
