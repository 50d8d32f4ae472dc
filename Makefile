PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready

.PHONY: quickstart test lint clean

# The whole path on real text, in minutes on a CPU.
quickstart: $(READY)
	$(BIN)/qsparse quickstart --output quickstart

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The environment; made anew when its description changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv quickstart runs
