# make demo   train on handwritten digits and sample them
# make test   run the tests
# make long   run those that take long: whole runs, killed, on several devices, as published
# make oldest run them with every requirement at its lower bound
# make docs   build the site in site/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/digits

.PHONY: setup demo test long oldest lint docs
setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(EXTRA_REQUIREMENTS) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m ppflow_jax.main --config=configs/digits.py --workdir=$(RUN)
	$(BIN)/python -m ppflow_jax.sample --checkpoint=$(RUN) --out=$(RUN)/demo --num=1000 --batch=250 \
		--cfg=2 --steps=20 --save_latents --nopngs
	@$(BIN)/python -m benchmarks.digits_consistency $(RUN)/demo
	@echo "pictures: $(RUN)/demo/grid.png $(RUN)/samples/ $(RUN)/loss.png; metrics: $(RUN)/metrics.jsonl"

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

long: $(STAMP)
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile --no-loadscope-reorder

# name>=1.2,<2 becomes name==1.2
oldest:
	$(MAKE) test VENV=$(VENV)-oldest \
		EXTRA_REQUIREMENTS="$$(sed -nE 's/^([^#>]*)>=([^,]*),.*/\1==\2/p' requirements.txt | xargs)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.house
	$(BIN)/mypy
	$(BIN)/shellcheck -x launch/*.sh launch/slurm.sbatch .ci/run tests/acceptance/*.sh

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/mkdocs build
