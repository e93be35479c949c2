# Two commands matter: `make report` and `make test`. Both start from nothing.
SHELL   := /bin/bash
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
STUDY   ?= phantom
BIN     := .venv/bin
READY   := .venv/.ready

.PHONY: report test lab bench mutants evidence programs readme clean help

help:
	@echo "make report [STUDY=phantom|hippocampus|natural|my.yaml] [VFM_DATA=folder]   run a study and build its site"
	@echo "make test      lint, export check, notebook tests, pytest"
	@echo "make lab       JupyterLab on nbs/, the tour first"
	@echo "make bench     benchmarks, as ratios against named alternatives"
	@echo "make evidence  what lies beside the pages, how it is made and from which commit; NAME=as_released makes one anew"
	@echo "make mutants   small wrong changes to the library: does a test fail? (about an hour; MUTANTS='--help')"

$(READY): settings.ini setup.py
	@echo "Environment: creating .venv and installing the pinned packages (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vfm_notes needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[radiomics]" 2>/dev/null \
	|| echo "Environment: pyradiomics could not be built here (it needs a C compiler); studies with 'radiomics: true' need it, its tests will be skipped"
	@touch $@

report: $(READY)
	@$(BIN)/vfm run $(STUDY); ran=$$?; [ $$ran -le 1 ] || exit $$ran; $(BIN)/vfm site $(STUDY) && exit $$ran

test: $(READY) programs
	@echo "1/4 lint"; $(BIN)/ruff check --quiet vfm_notes tests nbs
	@echo "2/4 export check"; before=$$(mktemp -d); cp -r vfm_notes $$before/; $(BIN)/nbdev_export; \
	diff -r -x __pycache__ $$before/vfm_notes vfm_notes || { echo "vfm_notes/ was not what nbs/ exports: run nbdev_export and commit both."; exit 1; }
	@echo "3/4 notebook tests"; home=$$(mktemp -d); env -u VFM_DATA -u VFM_WEIGHTS HOME=$$home XDG_CONFIG_HOME=$$home/.config XDG_CACHE_HOME=$$home/.cache VFM_RUNS=$$home/runs OMP_NUM_THREADS=1 $(BIN)/python tests/run_notebooks.py
	@echo "4/4 pytest"; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=25 tests

# The site and JupyterLab are tested in a real browser, accessibility with axe-core, batches on a real Slurm of one node. On a Debian machine where we are root they are installed; elsewhere those tests skip and say so.
AXE     := .venv/share/axe
programs: $(READY)
	@missing=""; command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing="chromium chromium-driver"; \
	command -v sbatch >/dev/null && command -v slurmctld >/dev/null && command -v munged >/dev/null || missing="$$missing slurm-wlm munge"; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	{ echo "Programs for tests: installing Debian's $$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; }; } \
	|| echo "Programs for tests: no $$missing here, their tests will be skipped"
	@test -d $(AXE)/axe_playwright_python || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target $(AXE) -r tests/axe.txt \
	|| echo "Programs for tests: pip could not fetch axe-core (tests/axe.txt), the tests of accessibility will be skipped"

lab: $(READY)
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/00_tour.ipynb

bench: $(READY)
	@for b in tests/bench/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

mutants: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py $(MUTANTS)

evidence: $(READY)
	@$(BIN)/python tests/evidence/make.py $(NAME)

# README.md is the front notebook's prose, word for word.
readme:
	@$(PYTHON) -c "import json; print('\n\n'.join(''.join(c['source']) for c in json.load(open('nbs/index.ipynb'))['cells'] if c['cell_type'] == 'markdown'))" > README.md

clean:
	rm -rf pages _site
