# A CPU needs no CUDA build of PyTorch: choose another with `make TORCH='torch==2.9.1' ...`
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
FAMILY ?= gpt
BIN = $(VENV)/bin
RUN = OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node

.PHONY: demo test lint torture bench fuzz plan-check memory-check clean

demo: $(VENV)/demo            ## train a GPT on real text over 4 processes (or FAMILY=bert, t5, finetune)
	$(RUN) 4 -m megafn demo --family $(FAMILY)

test: lint                    ## format, lint and types; then every test
	$(BIN)/python -m pytest

lint: $(VENV)/test            ## ruff and mypy, as pyproject.toml configures them
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

torture: $(VENV)/test         ## a training run killed 100 times, at random
	MEGAFN_KILLS=100 $(BIN)/python -m pytest tests/test_checkpoint_kills.py -k killed -o faulthandler_timeout=0

bench: $(VENV)/bench          ## speed side by side with the peers
	$(BIN)/python -m pytest bench --benchmark-sort=name -rs

fuzz: $(VENV)/test            ## 200 random products of layout and features held to the single process, 33 of them to their dry runs; planted bugs searched for
	$(BIN)/python -m pytest tests/test_fuzz.py tests/test_dry_run_real.py --cases 200 --planted --timeout 7200 -o faulthandler_timeout=0

plan-check: $(VENV)/demo      ## the error of the planner's times on every published result
	$(BIN)/python -m megafn.pure.planner.published.accuracy

memory-check: $(VENV)/test    ## the planner's bytes beside dry runs: every layout of the law, models of 7B to 405B
	OMP_NUM_THREADS=1 MEGAFN_ALL_PLANS=1 $(BIN)/python -m pytest tests/test_planner_memory.py --timeout 600 -o faulthandler_timeout=0

clean:
	rm -rf $(VENV) runs build *.egg-info

# one environment; each goal installs what it needs on top of the project itself
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test $(VENV)/bench: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
