# A virtual environment, the package in it, and what can be run there. Python >= 3.11 is needed, and a C++ compiler for the
# fused kernels.

PYTHON = python3
VENV = .venv
# Kept as it is where the environment has a torch already that is new enough.
TORCH = torch==2.13.0

DEMO = runs/demo
DEMO_ARGS =
PYTEST_ARGS =
# Of gpu-check, which installs nothing: it uses $(PYTHON) as it is.
OUT = runs/gpu-check

python = $(VENV)/bin/python
kernels = $(wildcard csrc/*.* csrc/*/*.* csrc/include/*/*.h)

.PHONY: help install demo test gpu-check lint clean distclean

help:
	@echo "make demo       trains the digits teacher and two one-step students; pictures and table go to $(DEMO)"
	@echo "make test       runs the tests"
	@echo "make gpu-check  with a GPU, nvcc and a PYTHON that has torch and triton: builds in place and runs all that needs a GPU,"
	@echo "                in under nine minutes; logs, JSON and plots go to OUT=$(OUT)"
	@echo "make lint       ruff and mypy"
	@echo "make install    the environment $(VENV) with the package, built and editable"
	@echo "make clean      removes what was built; distclean also $(VENV); neither removes runs/"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) DEMO=$(DEMO) DEMO_ARGS= PYTEST_ARGS="

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(python) -m fdistill_ops.trainer --out $(DEMO) $(DEMO_ARGS)
	@echo
	@echo "Pictures: $(DEMO)/*.png, all in one: $(DEMO)/overview.png"
	@echo "Table:    $(DEMO)/report.md"

test: $(VENV)/.installed-for-tests
	$(python) -m pytest -q --durations=10 $(PYTEST_ARGS)

gpu-check:
	$(PYTHON) bench/gpu_check.py $(OUT)

lint: $(VENV)/.lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

$(VENV)/.environment:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed: make PYTHON=...')"
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -c "from importlib.metadata import version; \
	  assert tuple(map(int, version('torch').split('.')[:2])) >= (2, 11)" 2>/dev/null || \
	  $(python) -m pip install $(TORCH)
	@touch $@

# Again where the kernels or the packaging changed; Python code is read where it lies.
$(VENV)/.installed: $(VENV)/.environment setup.py pyproject.toml $(kernels)
	$(python) -m pip install -e ".[trainer,test]"
	@touch $@

# The same with the CUDA kernels' emulator.
$(VENV)/.installed-for-tests: $(VENV)/.environment setup.py pyproject.toml $(kernels)
	FDISTILL_EMULATOR=1 $(python) -m pip install -e ".[trainer,test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.lint: $(VENV)/.installed
	$(python) -m pip install $$($(python) -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['lint'])")
	@touch $@

clean:
	rm -rf build dist *.egg-info fdistill_ops/_build.json fdistill_ops/_C*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.installed-for-tests $(VENV)/.lint

distclean: clean
	rm -rf $(VENV)
