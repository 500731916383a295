#   make quickstart   set up, then run the main job: jaxmerge improve configs/quickstart.yaml
#   make test         set up, then run the tests; LONG=1 make test runs those too that take long, as .ci/run does
#   make setup        only set up: .venv from constraints.txt, and the quickstart's pretrained model
#   make lint         ruff and pyright
#   make clean        remove .venv, caches and builds (runs/ stays)
#
# PYTHON=python3.12 selects the interpreter; without it, the one .venv has, or else the first of python3.12,
# python3.11 and python3 that works. ARGS goes to the run or to pytest: make test ARGS="-k linear".

BIN := .venv/bin
export PYTHON

.PHONY: quickstart test setup lint clean

quickstart: setup
	$(BIN)/jaxmerge improve configs/quickstart.yaml $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

setup:
	@.ci/setup

lint:
	@.ci/setup dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-oracle .venv-skypilot .venv-docs .cache .pytest_cache .ruff_cache build dist jaxmerge.egg-info
