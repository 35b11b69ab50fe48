# Every developer command. Each target sets up what it needs; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DATA ?= hub
OUT ?= runs/train
PORT ?= 8000

.DEFAULT_GOAL := help
.PHONY: help book site test portable train results lab notebooks clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20
	@echo "  options: make train DATA=hub|sample|FOLDER OUT=runs/mine; make results DATA=...; PYTHON=python3.12 chooses the interpreter"

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed (PYTHON=... chooses one)")'
	@echo "setting up .venv (about 7 GB, mostly PyTorch) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

book: .venv/ready  ## run every notebook and build the site
	@$(BIN)/python tools/check.py book

site: .venv/ready  ## look at the built book (http://127.0.0.1:8000); PORT=... chooses another port
	@test -d _build/html || $(BIN)/python tools/check.py pages
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: .venv/ready  ## everything that must hold: lint, unit tests, notebooks, the book
	@$(BIN)/python tools/check.py lint tests notebooks pages site

portable: .venv/ready  ## the notebooks under other instruction sets, threads and roundings (about 40 minutes)
	@$(BIN)/python tools/check.py portable

train: .venv/ready  ## train on the full data with the best device found
	@$(BIN)/ddpm-tutorial train --data $(DATA) --out $(OUT) $(if $(wildcard $(OUT)/state.safetensors),--resume)

results: .venv/ready  ## make the tables of the shipped weights again (hours; goes on where it stopped)
	@$(BIN)/python -m experiments --data $(DATA)

lab: .venv/ready  ## open JupyterLab on the chapters
	@$(BIN)/jupyter lab book

notebooks: .venv/ready  ## run all notebooks again, in place
	@$(BIN)/python tools/run_notebooks.py

clean:  ## remove what the other targets built, but no training run
	rm -rf .venv _build node_modules
