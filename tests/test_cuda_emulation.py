"""The CUDA kernels' logic without a GPU: their sources, run by the host (see emulated_cuda.py)."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attn_ext  # noqa: F401 - defines the ops

TESTS = Path(__file__).parent
ROOT = TESTS.parent

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc" / "cuda").exists(), reason="no sources of the kernels"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="emulated on x86 Linux"
    ),
]


def run_emulated(*arguments: str, small: bool = False) -> str:
    """Run tests in a process whose only backend is the emulated one; returns what pytest says."""
    sys.path.insert(0, str(TESTS))
    import emulated_cuda

    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    if small:
        environment["ATTN_EXT_EMULATED_DEFINITIONS"] = emulated_cuda.SMALL
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "emulated_cuda",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    return run.stdout


def passed(report: str) -> int:
    return int(re.search(r"(\d+) passed", report)[1])


# Files whose tests run in one process, and how many of them at least.
SUITE = {
    ("additive_attention", "masks", "strides"): 100,
    ("attention_memory", "attention_memory_modes", "attention_memory_programs", "dropout"): 100,
    ("scores", "attention_memory_family", "features", "pool"): 90,
    ("corrupt_values", "fake_tensors", "hard_cases", "magnitudes"): 100,
}


@pytest.mark.parametrize("names", SUITE, ids="-".join)
def test_the_suite(names: tuple[str, ...]):
    files = [f"tests/test_{name}.py" for name in names]
    but_for = "not default_backend"  # it is not emulated ones that a call gets unasked
    assert passed(run_emulated(*files, "-k", but_for)) >= SUITE[names]


def test_several_tiles_splits_and_orders():
    assert passed(run_emulated("tests/cuda_emulation/cases.py")) > 40


def test_several_waves_of_queries():
    """Scores of few queries at a time: gradients of keys and values gather over waves."""
    files = [f"tests/test_{name}.py" for name in ("additive_attention", "dropout", "scores")]
    layouts = "test_layouts or test_dtypes or test_dropout"
    assert passed(run_emulated(*files, "-k", layouts, small=True)) > 40


def test_other_tests_see_no_emulation():
    """It lives in processes of its own."""
    name = "attn_ext_cuda::additive_attention_forward"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
