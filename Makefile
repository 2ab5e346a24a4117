# Two commands do everything: `make reproduce` and `make test`. `make help` lists the rest.
PROFILE ?= tiny
PROCESSES ?= 1
PYTHON ?= python3
ifeq ($(CONDA_DEFAULT_ENV),ragkit)
RUN := python
READY :=
else
RUN := .venv/bin/python
READY := .venv/ready
endif
# The code is always this checkout's, also where an environment was copied from another one.
export PYTHONPATH := $(CURDIR)
CHANGES := $(foreach change,$(SET),--set '$(change)')
# Several processes work as one: `make reproduce PROCESSES=8` on a machine with eight GPUs.
ifeq ($(PROCESSES),1)
RAGKIT := $(RUN) -m ragkit
else
RAGKIT := $(RUN) -m torch.distributed.run --nproc_per_node $(PROCESSES) -m ragkit
endif

.PHONY: help plan reproduce lab test slow report reference course nouns lint bench pretrain starts study tidy clean
help:            ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet -e '.[dev]'
	touch .venv/ready

plan: $(READY)       ## what a run of PROFILE would fetch, need and take, before it is begun; SET as in reproduce
	$(RUN) -m ragkit plan --profile '$(PROFILE)' $(CHANGES)

reproduce: $(READY)  ## every stage, notebook and the report of PROFILE (default tiny); SET="key=value ..." changes it
	$(RAGKIT) reproduce --profile '$(PROFILE)' $(CHANGES)

test: $(READY)       ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

slow: $(READY)       ## the tests that take many minutes
	$(RUN) -m pytest tests -m slow

bench: $(READY)      ## attention: plain, ours, eager (an hour of a quiet machine)
	$(RUN) tests/benchmarks/attention.py runs/bench

lint: $(READY)       ## ruff, mypy, and the order of the rooms
	$(RUN) -m ruff check ragkit tests
	$(RUN) -m ruff format --check ragkit tests
	$(RUN) -m mypy
	$(RUN) -c 'from importlinter.cli import lint_imports_command as lint; lint()'

lab: $(READY)        ## JupyterLab on working copies of the notebooks; those in lab/ are kept
	mkdir -p lab
	for one in notebooks/*.ipynb; do [ -e lab/$${one##*/} ] || cp $$one lab/; done
	$(RUN) -m jupyter lab lab $(if $(filter 0,$(shell id -u)),--allow-root)

report: $(READY)     ## write the report of PROFILE again
	$(RUN) -m ragkit report --profile '$(PROFILE)'

reference: $(READY)  ## make the run of PROFILE (with its SET) its reference in figures/ and in the README
	$(RUN) -m ragkit reference --profile '$(PROFILE)' $(CHANGES)

course: $(READY)     ## student and solution notebooks and a lesson plan, tried on the finished run of PROFILE
	$(RUN) -m ragkit course --profile '$(PROFILE)'

nouns: $(READY)      ## train a noun finder for real text: TREEBANK=file.conllu OUT=folder
	mkdir -p runs
	$(RUN) -m papermill notebooks/appendix/nouns.ipynb runs/nouns.ipynb -p TREEBANK '$(abspath $(TREEBANK))' -p OUT '$(abspath $(OUT))'

tidy: $(READY)       ## remove what the run of PROFILE does not need any more
	$(RUN) -m ragkit tidy --profile '$(PROFILE)'

pretrain: $(READY)   ## train the embedded readers again (hours); a killed run goes on
	mkdir -p runs
	$(RUN) -m papermill notebooks/appendix/pretraining.ipynb runs/pretraining.ipynb -p OUT ragkit/assets/reader
	$(RUN) -m papermill notebooks/appendix/pretraining_fid.ipynb runs/pretraining_fid.ipynb -p OUT ragkit/assets/encoder_decoder

# The other beginnings of notebook 11's readers, by family and width; `make -j2 starts` for two cores.
STARTS := $(addprefix ragkit/assets/starts/,falcon-64 falcon-96 falcon-128 gpt_neox-64 persimmon-64)
starts: $(STARTS:%=%/sha256.txt)  ## train again what some of these readers begin with (hours)
ragkit/assets/starts/gpt_neox-64/sha256.txt: MORE := -p EARLY 2500
ragkit/assets/starts/falcon-96/sha256.txt: MORE := -p PEAK_RATE 2e-3
ragkit/assets/starts/falcon-64/sha256.txt: MORE := -p DAMAGED True

ragkit/assets/starts/%/sha256.txt: $(READY)
	mkdir -p runs
	$(RUN) -m papermill notebooks/appendix/pretraining.ipynb runs/pretraining-$*.ipynb -p OUT $(@D) -p DTYPE float16 \
		-p FAMILY $(word 1,$(subst -, ,$*)) -p HIDDEN $(word 2,$(subst -, ,$*)) -p STEPS 4000 -p SEED 1 -p SHORT_PAGES 2500 $(MORE)

study: $(READY)      ## the table of notebook 11 again: what a hundred readers teach (hours); a killed run goes on
	mkdir -p runs/study
	$(RUN) -m papermill notebooks/appendix/study.ipynb runs/study/study.ipynb -p RUNS runs -p OUT figures/study
	RAGKIT_FIGURES=runs/study/figures $(RUN) -m papermill notebooks/11_who_can_teach.ipynb runs/study/11.ipynb -p RUNS runs
	cp runs/study/figures/11_judge.csv ragkit/assets/judge.csv

clean:           ## remove runs and the environment
	rm -rf runs .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .import_linter_cache
