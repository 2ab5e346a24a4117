# Two commands do everything: `make reproduce` and `make test`. `make help` lists the rest.
PROFILE ?= tiny
ifeq ($(CONDA_DEFAULT_ENV),ragkit)
BIN :=
READY :=
else
BIN := .venv/bin/
READY := .venv/ready
endif
PYTHON ?= python3

.PHONY: help plan reproduce lab test slow report reference course lint bench pretrain clean doctor
help:            ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet -e '.[dev]'
	touch .venv/ready

plan: $(READY)       ## what a run of PROFILE would fetch, need and take, before it is begun (about a minute); SET as in reproduce
	$(BIN)python -m ragkit plan --profile '$(PROFILE)' $(foreach change,$(SET),--set '$(change)')

reproduce: $(READY)  ## run every notebook of PROFILE (default tiny) in order and write the report; SET="key=value ..." changes the profile
	$(BIN)python -m ragkit reproduce --profile '$(PROFILE)' $(foreach change,$(SET),--set '$(change)')

test: $(READY)       ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

slow: $(READY)       ## the tests that take many minutes (real text in full)
	$(BIN)python -m pytest tests -m slow

bench: $(READY)      ## attention (plain, ours, eager), encoding beside sentence-transformers, an index of a million vectors (about an hour of a quiet machine)
	$(BIN)python tests/benchmarks/attention.py runs/bench
	$(BIN)python tests/benchmarks/encode.py runs/bench
	$(BIN)python tests/benchmarks/index.py runs/bench

lint: $(READY)       ## ruff and mypy
	$(BIN)ruff check ragkit tests
	$(BIN)ruff format --check ragkit tests
	$(BIN)mypy

lab: $(READY)        ## JupyterLab on working copies of the notebooks
	$(BIN)jupyter lab $$($(BIN)python -m ragkit lab)

report: $(READY)     ## write the report of PROFILE again
	$(BIN)python -m ragkit report --profile '$(PROFILE)'

reference: $(READY)  ## make the run of PROFILE the reference in figures/ and in the README
	$(BIN)python -m ragkit reference --profile '$(PROFILE)'

course: $(READY)     ## student and solution notebooks and a lesson plan, tried on the finished run of PROFILE
	$(BIN)python -m ragkit course --profile '$(PROFILE)'

doctor: $(READY)     ## can this machine run it?
	$(BIN)python -m ragkit doctor

pretrain: $(READY)   ## train the embedded reader again (hours)
	$(BIN)python -m ragkit.pretrain ragkit/assets/reader

clean:           ## remove runs and the environment
	rm -rf runs .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
