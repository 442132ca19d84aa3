# A virtual environment, the package in it, and what can be run there. Python >= 3.10 is needed, and a C++ compiler for the
# fused kernels.

PYTHON = python3
VENV = .venv
# Kept as it is where the environment has a torch already that is new enough.
TORCH = torch==2.13.0

DEMO = runs/demo
DEMO_ARGS =
SELFCHECK_ARGS =
PYTEST_ARGS =
# Processes that share the tests: as many as there are cores, up to eight.
JOBS = auto
# Of fuzz: for how long, or how many calls of each back end; the same seed gives the same calls.
SECONDS = 60
CALLS =
SEED = 0
BACKENDS = cpu reference
SANITIZERS = asan tsan
SANITIZE_ARGS =
# Of pins: arguments of nox, such as -s "tests(numpy-1)"; FULL=1 takes PyTorch's builds of several gigabytes too.
NOX_ARGS =
FULL =
# Of gpu-check, which installs nothing: it uses $(PYTHON) as it is.
OUT = runs/gpu-check

python = $(VENV)/bin/python
pytest = $(python) -m pytest -q --durations=10 -n $(JOBS) --maxprocesses 8
kernels = $(wildcard csrc/*.* csrc/*/*.* csrc/include/*/*.h)

.PHONY: help install demo selfcheck test test-all sanitize fuzz pins gpu-check lint clean distclean

help:
	@echo "make demo       trains the digits teacher and two one-step students; pictures and table go to $(DEMO)"
	@echo "make selfcheck  runs every back end of this machine against the formulas in float64 (SELFCHECK_ARGS=)"
	@echo "make test       runs what a change usually breaks, on every back end: three minutes on two cores, once it is built"
	@echo "make test-all   runs every test"
	@echo "make sanitize   runs the numeric tests and a thousand random calls of each back end, compiled with each of the"
	@echo "                SANITIZERS=\"$(SANITIZERS)\": AddressSanitizer with UndefinedBehaviorSanitizer, ThreadSanitizer"
	@echo "make fuzz       draws calls of the public functions, right and wrong ones, for SECONDS=$(SECONDS) or CALLS= of each of the"
	@echo "                back ends BACKENDS=\"$(BACKENDS)\"; a script for each finding goes to runs/fuzz"
	@echo "make pins       runs the tests under other versions of Python, PyTorch and NumPy, and with clang (NOX_ARGS= FULL=)"
	@echo "make gpu-check  with a GPU, nvcc and a PYTHON that has torch and triton: builds in place and runs all that needs a GPU,"
	@echo "                in under nine minutes; logs, JSON and plots go to OUT=$(OUT)"
	@echo "make lint       ruff, mypy and clang-format"
	@echo "make install    the environment $(VENV) with the package, built and editable"
	@echo "make clean      removes what was built; distclean also $(VENV), .nox; neither removes runs/"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) DEMO=$(DEMO) DEMO_ARGS= PYTEST_ARGS= JOBS=$(JOBS) SEED=$(SEED)"

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(python) -m fdistill_ops.trainer --out $(DEMO) $(DEMO_ARGS)
	@echo
	@echo "Pictures: $(DEMO)/*.png, all in one: $(DEMO)/overview.png"
	@echo "Table:    $(DEMO)/report.md"

selfcheck: $(VENV)/.installed
	$(python) -m fdistill_ops.selfcheck $(SELFCHECK_ARGS)

test: $(VENV)/.installed-for-tests
	$(pytest) --quick $(PYTEST_ARGS)

test-all: $(VENV)/.installed-for-tests
	$(pytest) $(PYTEST_ARGS)

sanitize: $(VENV)/.installed-for-tests
	$(python) tests/sanitize $(SANITIZERS) $(SANITIZE_ARGS)

fuzz: $(VENV)/.installed-for-tests
	$(python) -m tests.fuzz --backends "$(BACKENDS)" --seed $(SEED) \
	  $(if $(CALLS),--calls $(CALLS),--seconds $(SECONDS))

pins: $(VENV)/.pins
	FDISTILL_FULL=$(FULL) $(python) -m nox $(NOX_ARGS)

gpu-check:
	$(PYTHON) bench/gpu_check.py $(OUT)

lint: $(VENV)/.lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(kernels))

$(VENV)/.environment:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('Python 3.10 or newer is needed: make PYTHON=...')"
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -c "from importlib.metadata import version; \
	  assert tuple(map(int, version('torch').split('.')[:2])) >= (2, 4)" 2>/dev/null || \
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
	$(python) -m pip install $$($(python) -c "from importlib.metadata import requires; \
	  print(*(r.split(';')[0].replace(' ', '') for r in requires('fdistill_ops') if 'extra == \"lint\"' in r))")
	@touch $@

$(VENV)/.pins: $(VENV)/.environment
	$(python) -m pip install nox
	@touch $@

clean:
	rm -rf build dist *.egg-info fdistill_ops/_build.json fdistill_ops/_C*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.installed-for-tests $(VENV)/.lint

distclean: clean
	rm -rf $(VENV) .nox
