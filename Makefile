# Every target does its own set-up; see tools/environment.py. Needs Python 3.10 to 3.13.
#   make demo [ARGS="--ranks 8 --machines 4"]    xDiT with usp, tas and torus on this machine
#   make test [ARGS="-k mesh"]                   the tests that are not marked slow
#   make test-all                                all tests
#   make lint                                    ruff and mypy

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint

# The first Python of a supported version; `make PYTHON=...` names another.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
  && { echo $$p; exit; }; done; echo python3)
ARGS ?=

# Sets $$python to the interpreter that is ready to use.
ENVIRONMENT = python=$$($(PYTHON) tools/environment.py)
# Ranks share the cores: one thread each.
RUN = OMP_NUM_THREADS=1 "$$python" -m

help:
	@sed -n '2,5s/^# *//p' Makefile

demo:
	@$(ENVIRONMENT) && $(RUN) swiftfusion_xdit demo $(ARGS)

test:
	@$(ENVIRONMENT) && $(RUN) pytest -m "not slow" $(ARGS)

test-all:
	@$(ENVIRONMENT) && $(RUN) pytest $(ARGS)

lint:
	@$(ENVIRONMENT) && $(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy
