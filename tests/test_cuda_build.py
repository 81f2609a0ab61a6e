"""The CUDA library as nvcc builds it: resources, machine code, and what it asks of PyTorch.

Nothing here needs a GPU or a CUDA build of PyTorch, only nvcc.
"""

import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

ROOT = Path(__file__).resolve().parents[1]
# Each takes nvcc as long as the others.
ARCHS = ("sm_90", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("sm_80", "sm_100")))
FILES = [path.name for path in emulated_cuda.cuda_sources()]
# setup.py's, with those that torch adds to them.
FLAGS = (
    *COMMON_NVCC_FLAGS,
    *("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"),
    emulated_cuda.TARGET,
)

# By kernel: threads of a block, and the warps that an SM must be able to hold.
RESOURCES = {
    "score_kernel": (256, 16),
    "product_kernel": (128, 12),
    "softmax_gradient_kernel": (128, 24),
    "weighted_kernel": (128, 12),
    "gradient_kernel": (32, 12),
    "merge_dquery_kernel": (256, 40),
    "merge_dweight_kernel": (256, 32),
    "step_kernel": (256, 16),
    "step_merge_kernel": (256, 24),
    "compact_mask_kernel": (256, 48),
    "order_kernel": (256, 32),
    "pool_gradient_kernel": (128, 16),
}
STATIC_SHARED = 48 << 10  # bytes that a kernel may have without asking for more


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    if not found:
        pytest.skip("nvcc is not installed")
    return found


def compiled(name: str, arch: str) -> Path:
    source = ROOT / "csrc" / "cuda" / name
    command = [nvcc(), *FLAGS, f"-arch={arch}", "-Xptxas=-v", "-c", str(source)]
    return emulated_cuda.cached(f"{source.stem}.{arch}.o", command)


@functools.cache
def disassembled(file: str, arch: str) -> dict:
    pytest.importorskip("triton", reason="Triton's wheel brings the disassembler")
    from benchmarks import sass

    return sass.disassemble(compiled(file, arch))


def kernels_of(arch: str, name: str | None = None) -> Iterator:
    """The kernels of one source, or of all, with their names without namespaces."""
    for file in FILES if name is None else [name]:
        for mangled, kernel in disassembled(file, arch).items():
            short = re.search(r"\d([a-z_]+_kernel)", mangled)[1]
            yield short, mangled, kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", FILES)
def test_compiles_without_spills(name: str, arch: str):
    log = compiled(name, arch).with_suffix(".log").read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills, log
    assert set(spills) == {("0", "0")}, log
    assert "warning" not in log, log


def test_older_gpus():
    """What came with sm_80 has a substitute: an unusual list of GPUs must not break an install."""
    compiled("product.cu", "sm_75")
    compiled("gradient.cu", "sm_75")


@pytest.mark.parametrize("arch", ARCHS)
def test_resources(arch: str):
    """No local memory, no kernel missing from the table, and enough warps to hide waiting."""
    seen = Counter()
    for name, mangled, kernel in kernels_of(arch):
        threads, warps = RESOURCES[name]
        seen[name] += 1
        assert kernel.spills == 0, mangled
        assert kernel.shared <= STATIC_SHARED, mangled
        assert kernel.occupancy(threads).warps >= warps, (mangled, kernel.occupancy(threads))
    assert set(seen) == set(RESOURCES)


def is_exact(block: list) -> bool:
    """Whether machine code computes tanh itself: an exponential and a reciprocal for each."""
    names = Counter(instruction.name for instruction in block)
    return names["MUFU.EX2"] >= names["MUFU.RCP"] > 0


def factored_loops(arch: str, name: str, mark: str) -> list:
    """The main loops of a kernel: with the reciprocals of pairs."""
    from benchmarks.sass import Counts

    loops = []
    for _, mangled, kernel in kernels_of(arch, name):
        if mark in mangled:
            loops += [Counts.of(loop.straight(is_exact)) for loop in kernel.innermost_loops]
    loops = [c for c in loops if c.names["MUFU.RCP"] > c.names["MUFU.EX2"]]
    assert loops, f"{name} for {arch}: no main loop was found"
    return loops


def slots(counts) -> float:
    """Issue slots for one element (query, key, feature): a reciprocal serves two."""
    return counts.slots / (2 * counts.names["MUFU.RCP"])


@pytest.mark.parametrize("arch", ARCHS)
def test_issue_slots_of_the_main_loops(arch: str):
    """Forward at most 4.2, without exponentials and loads; backward with those of its query."""
    (scores,) = factored_loops(arch, "scores.cu", "score_kernel")
    assert scores.mufu == scores.names["MUFU.RCP"]
    assert slots(scores) <= 4.2
    assert not scores.global_loads
    for dtype, most in (("13__nv_bfloat16", 7.8), ("6__half", 9.2), ("f", 10.1)):
        (gradients,) = factored_loops(arch, "gradient.cu", f"gradient_kernelI{dtype}Lb1ELb1E")
        assert slots(gradients) <= most, dtype


@pytest.mark.parametrize("arch", ARCHS)
def test_sixteen_bytes_a_load(arch: str):
    """Rows of aligned tensors."""
    for name, mangled, kernel in kernels_of(arch, "scores.cu"):
        assert kernel.total.widths["LDG"][16] >= 24, (name, mangled)
    for name, mangled, kernel in kernels_of(arch, "step.cu"):
        if name == "step_kernel":
            assert kernel.total.widths["LDG"][16] >= 8, (name, mangled)
    for name, mangled, kernel in kernels_of(arch, "pool.cu"):
        assert kernel.total.widths["LDG"][16] >= 6, (name, mangled)
        assert kernel.total.widths["STG"][16] >= 6, (name, mangled)


@pytest.fixture(scope="module")
def library() -> Path:
    """The library for sm_90, linked against CUDA's runtime and nothing else."""
    include = f"-Xcompiler=-isystem{emulated_cuda.torch_include()}"
    source = ROOT / "csrc" / "cuda" / "registration.cpp"
    command = [nvcc(), *FLAGS, include, "-c", str(source)]
    objects = [compiled(name, "sm_90") for name in FILES]
    objects.append(emulated_cuda.cached("registration.o", command))
    link = [nvcc(), "-shared", "-cudart=static", *map(str, objects)]
    return emulated_cuda.cached("_C_cuda.so", link)


def test_only_the_stable_abi_is_asked_for(library: Path):
    if not shutil.which("nm"):
        pytest.skip("no nm")
    nm = ["nm", "--dynamic", "--undefined-only", str(library)]
    listing = subprocess.run(nm, check=True, text=True, capture_output=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in names
    # Mangled at::, c10:: and torch:: names, and CPython's, change between releases.
    unstable = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch", "Py", "_Py")
    assert not [name for name in names if name.startswith(unstable)]
