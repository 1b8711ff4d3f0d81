PYTHON ?= python3
BIN := .venv/bin

# torch comes from constraints.txt as its CPU build; on a GPU machine install with `pip install .` instead.
.venv/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e .
	touch $@

.venv/.test: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	touch $@

.PHONY: demo test test-slow lint clean
demo: .venv/.core  ## train on one real document of half a million characters, on the CPU
	$(BIN)/python benchmarks/demo.py

test: .venv/.test lint  ## everything that CI runs
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.test  ## the long ones
	$(BIN)/python -m pytest -m slow

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
