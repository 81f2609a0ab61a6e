# `make` lists the targets. Everything runs in .venv, which they make themselves.

.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CORPUS ?= homeassistant
OUT ?= runs/$(CORPUS)
# Tests that have the triton backend as a parameter, or are about it.
INTERPRETED := $(patsubst %,tests/test_%.py,additive_attention attention_memory \
    attention_memory_family attention_memory_modes attention_memory_programs corrupt_values \
    dropout fake_tensors features hard_cases magnitudes masks numerics pool properties scores \
    strides triton)
# `make gpu` works beside the checkout's own build, whose libraries may be for another torch.
GPU_ENV := PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR) PYTHONSAFEPATH=1
GPU := $(GPU_ENV) $(PYTHON)
# Two threads a worker would only contend: the tests that are about threads set their number.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 8 ] && echo $$n || echo 8)

# TORCH=cuda installs the locked torch for CUDA, TORCH=2.12.0 or TORCH=anything pip takes another;
# the venv remembers it.
CHOSEN := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(CHOSEN)
ifneq ($(TORCH),$(CHOSEN))
$(VENV)/.installed: FORCE
endif
PLAIN_VERSION := $(shell echo '$(TORCH)' | grep -Ex '[0-9]+(\.[0-9]+)*(\+[a-z0-9.]+)?')
CHOSEN_TORCH := $(foreach word,$(or $(PLAIN_VERSION:%=torch==%),$(TORCH)),'$(word)')

SOURCES := $(shell find csrc -type f 2>/dev/null)
PIP := $(PY) -m pip --disable-pip-version-check
# Only files whose hashes are written down, and no sources, whose build would fetch others.
LOCKED := install -qq --require-hashes --only-binary=:all: --no-deps
LOCKED_CUDA := $(LOCKED) -r requirements/locked-torch.txt -r requirements/locked-cuda.txt
UV ?= uv

help: ## list the targets
	@awk -F ': .*## |: ## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile
	@echo "TORCH=cuda|2.12.0 (or what pip takes), PYTHON=python3.12, MAX_JOBS=2, ATTN_EXT_BUILD_{CPU,CUDA}=0|1"

venv: $(VENV)/.built ## make .venv: pinned packages, and this package built and installed in place

train: $(VENV)/.built ## train a translation model (CORPUS=homeassistant|libreoffice, ARGS="...")
	$(PY) -m attn_ext.nmt.train --corpus $(CORPUS) --out $(OUT) \
	    $$([ ! -e $(OUT)/checkpoint.pt ] || echo --resume) $(ARGS)

test: $(VENV)/.built $(VENV)/.peers ## run the tests (ARGS="-k name")
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)
	@# The Triton kernels, run by its interpreter: on machines without a GPU they are Python too.
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal \
	    $(ARGS) $(INTERPRETED) || [ $$? -eq 5 ]

test-all: ## all cases of all tests, which takes long (ARGS="-k name")
	ATTN_EXT_TEST_ALL=1 $(MAKE) test

matrix: $(VENV)/.built ## test the op with other Pythons and PyTorches, and the kernels on aarch64
	$(PY) tests/matrix.py $(ARGS)

planted: $(VENV)/.built ## plant known defects, one at a time, and see which tests notice
	$(PY) tests/planted.py $(ARGS)

# With the python that is there and what it has: nothing is downloaded, nothing but build/ written.
gpu: ## build, test and time on the GPU at hand, with $(PYTHON) as it is (ARGS="-k name")
	@$(PYTHON) -c 'import torch; torch.cuda.is_available() or exit("make gpu: PyTorch finds no GPU")'
	@# Without --upgrade pip would leave what an earlier run put there.
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation --upgrade \
	    --force-reinstall --target build/gpu .
	@# What fails in one part keeps no other from running; the shell fails at its end. The tools of
	@# compute-sanitizer are slow: of the numbers of heads only 3, with the loops over heads.
	@failed=0; \
	(set -x; $(GPU) -m pytest -q -m gpu $$($(PYTHON) -c 'import xdist' 2>/dev/null && \
	    printf '%s ' -n $(WORKERS) --dist worksteal) $(ARGS)) || failed=1; \
	(set -x; $(GPU) -m benchmarks.bench_additive_attention --device cuda) || failed=1; \
	(set -x; $(GPU) -m benchmarks.bench_training --device cuda) || failed=1; \
	if command -v compute-sanitizer >/dev/null; then \
	    for tool in memcheck racecheck initcheck; do (set -x; \
	        $(GPU_ENV) compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	            $(PYTHON) -m pytest -q -m gpu tests/test_additive_attention.py \
	            -k "test_layouts and 3 and (jagged or padded_mask or one_step)") || failed=1; done; \
	else echo "make gpu: compute-sanitizer is not installed, skipped"; fi; \
	exit $$failed

# The arguments of a run a line, so many runs at a time; xargs fails if one of them does.
PTX := OMP_NUM_THREADS=1 $(PY) -m tests.ptx
gpu-proof: $(VENV)/.built ## execute the PTX of all GPU kernels without a GPU, which takes hours
	@mkdir -p build
	@nvcc=$$(command -v nvcc || echo "make gpu-proof: nvcc was not found, CUDA C++ is SKIPPED" >&2); \
	for backend in triton $${nvcc:+cuda}; do \
	    for target in sm_80 sm_90; do for dtype in float32 bfloat16 float16; do \
	        echo $$backend --target $$target --dtype $$dtype; done; done; \
	    echo $$backend --noise; echo $$backend --order 1; \
	done >build/gpu-proof; \
	for kernel in fwd bwd_scores grad; do \
	    echo triton --only jagged --dtype bfloat16 --order 1 --mutate $$kernel 8; \
	done >>build/gpu-proof; \
	[ -z "$$nvcc" ] || echo cuda --small-waves >>build/gpu-proof; \
	xargs -P $(WORKERS) -I{} sh -xc '$(PTX) {} $(ARGS)' <build/gpu-proof

fuzz: $(VENV)/.built ## check properties of 20,000 random calls, resumed if interrupted (ARGS="--help")
	OMP_NUM_THREADS=1 $(PY) tests/fuzz.py $(ARGS)

sanitize: $(VENV)/.editable ## run the tests under the address, undefined and thread sanitizers
	bash tests/sanitize.sh $(PY) $(WORKERS)

bench: $(VENV)/.built ## time the op beside what one would pick instead (ARGS="--help")
	$(PY) -m benchmarks.bench_additive_attention $(or $(ARGS),--more)

docs: .venv-docs/.installed ## build the documentation site in build/site, offline; warnings are errors
	.venv-docs/bin/mkdocs build --strict --site-dir build/site

dist: $(VENV)/.installed .venv-release/.installed ## make dist/: sources and a wheel, both tried in new environments
	PATH=$(CURDIR)/.venv-release/bin:$$PATH $(PY) tests/dist.py $(ARGS)

types: $(VENV)/.installed .venv-release/.installed ## whether type checkers know every type of the public API
	PATH=$(CURDIR)/.venv-release/bin:$$PATH $(PY) tests/check_types.py

lint: $(VENV)/.installed ## check the style of Python and C++
	@# The pins resolve on any mirror: no index is written down.
	! grep -nE '://|index-url|find-links' requirements/*
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.installed ## rewrite Python and C++ in that style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs -r $(VENV)/bin/clang-format -i

lock: ## pin newer packages: writes requirements/locked*.txt, needs uv (ARGS="--upgrade")
	@command -v $(UV) >/dev/null || { \
	    echo "make: $(UV) was not found; UV=... names another (pip install uv)" >&2; exit 1; }
	UV=$(UV) $(PYTHON) requirements/lock.py $(ARGS)

clean: ## remove what was built; .venv and runs/ stay
	rm -rf build dist attn_ext.egg-info attn_ext/*.so $(VENV)/.built .pytest_cache .ruff_cache
	find attn_ext triton_kernels tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV) .venv-docs .venv-release

# Stamps, each written when its step is whole. An install that was cut off leaves
# .incomplete behind, and the next one starts again from nothing.
$(VENV)/.installed: $(wildcard requirements/*.txt)
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: $(PYTHON) was not found; PYTHON=... names another" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: $(PYTHON) is older than 3.10; PYTHON=... names another" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) cannot make environments (Debian: apt-get install python3-venv)" >&2; \
	    exit 1; }
	@rm -f $(VENV)/.installed $(VENV)/.editable $(VENV)/.built
	@if [ -e $(VENV)/.incomplete ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.incomplete
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(LOCKED) -r requirements/locked.txt
ifeq ($(TORCH),)
	@# The build for CPUs saves several GB, and is locked for some Pythons only. Where there is one
	@# and it cannot be had (a time-out, a full disk, a wrong hash), pip's message is the last word.
	@failed=0; $(PIP) $(LOCKED) -r requirements/torch-cpu.txt 2>$(VENV)/pip.log || failed=$$?; \
	cat $(VENV)/pip.log >&2; [ $$failed -eq 0 ] || { \
	    grep -q "No matching distribution" $(VENV)/pip.log || exit $$failed; \
	    echo "make: pip found no locked PyTorch for CPUs, see above;" \
	        "taking the registry's, for CUDA, several GB" >&2; $(PIP) $(LOCKED_CUDA); }
else ifeq ($(TORCH),cuda)
	$(PIP) $(LOCKED_CUDA)
else
	@# One's own choice cannot be locked, but it exchanges nothing that is.
	@sed -n 's/^\([a-z].*\) \\$$/\1/p' requirements/locked.txt >$(VENV)/kept.txt
	$(PIP) install -q -c $(VENV)/kept.txt $(CHOSEN_TORCH)
endif
	$(PIP) show -q triton 2>/dev/null || $(PIP) $(LOCKED) -r requirements/locked-triton.txt
	$(PIP) check
	@echo '$(TORCH)' >$(VENV)/.torch
	@rm $(VENV)/.incomplete
	@touch $@

# What attn_ext.compat replaces, beside the environment so that only its tests find it; without a
# network they skip, visibly.
$(VENV)/.peers: $(VENV)/.installed
	@$(PIP) $(LOCKED) --no-compile --upgrade --retries 1 --timeout 10 --target $(VENV)/peers \
	    -r requirements/locked-peers.txt && touch $@ || \
	    echo "make: without the packages that attn_ext.compat replaces, some of its tests skip" >&2

# What pyproject.toml names is locked and there already; the next step builds.
$(VENV)/.editable: $(VENV)/.installed pyproject.toml setup.py
	ATTN_EXT_BUILD_CPU=0 $(PIP) install -qq --no-build-isolation --no-deps -e .
	$(PIP) check
	@touch $@

# Without a compiler nothing is built and no stamp written: once there is one, make finds it.
$(VENV)/.built: $(VENV)/.editable $(SOURCES)
	@$(PY) setup.py -q build_ext --inplace
	@if [ -e attn_ext/_C.abi3.so ]; then touch $@; fi

# Tools that only a few need, in environments of their own.
.venv-%/.installed: requirements/locked-%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check $(LOCKED) -r $<
	@touch $@

.PHONY: help venv train test test-all matrix planted gpu gpu-proof fuzz sanitize bench docs dist types lint format lock clean distclean FORCE
FORCE:
.DELETE_ON_ERROR:
