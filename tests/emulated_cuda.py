"""The CUDA backend on CPU tensors: its kernels compiled for the host, where fibers emulate threads.

As a plugin of pytest (``pytest -p emulated_cuda``) it puts backend "cuda" in place of all others,
so that the suite's tests of kernels run the sources of ``csrc/cuda`` without a GPU.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cuda_tests"
EMULATION = Path(__file__).parent / "cuda_emulation"
OPS = (
    *("forward", "backward", "step_backward", "memory_backward"),
    *("pool_forward", "pool_backward"),
)  # as attn_ext.ops calls them
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# So little room that small tests need several waves of queries and gather gradients.
SMALL = "-DATTN_EXT_CUDA_WAVE_BYTES=4096"


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def torch_include() -> Path:
    return Path(torch.__file__).parent / "include"


def cached(name: str, command: list[str], *folders: Path) -> Path:
    """What ``command -o FILE`` makes, again only after a change of it or of a file it may read."""
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    files = sorted((ROOT / "csrc").glob("*.h"))
    for folder in (ROOT / "csrc" / "cuda", *folders):
        files += sorted(folder.glob("*"))
    for path in files:
        digest.update(path.read_bytes())
    target = CACHE / digest.hexdigest()[:16] / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{os.getpid()}-{name}")
        run = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}{run.stderr}"
        target.with_suffix(".log").write_text(run.stdout + run.stderr)
        unfinished.replace(target)
    return target


@functools.cache
def build(*definitions: str) -> Path:
    """The shared library of the emulated backend."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "no C++ compiler"
    flags = [
        *(compiler, "-std=c++17", "-O2", "-fPIC", "-mf16c", "-mfma", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *("-DUSE_CUDA", TARGET, "-DATTN_EXT_CUDA_KEY=CPU"),
        *(f"-I{EMULATION}", f"-isystem{torch_include()}"),
    ]
    host = ROOT / "csrc/cuda/registration.cpp"  # all that definitions are about
    sources = [(path, ()) for path in (*cuda_sources(), EMULATION / "emulation.cpp")]
    sources.append((host, definitions))

    def compiled(source: tuple[Path, tuple[str, ...]]) -> Path:
        path, options = source
        return cached(f"{path.name}.o", [*flags, *options, "-x", "c++", "-c", str(path)], EMULATION)

    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a test run build together, not each
        objects = list(pool.map(compiled, sources))
        libraries = Path(torch.__file__).parent / "lib"
        link = [compiler, "-shared", "-Wl,-Bsymbolic", *map(str, objects), f"-L{libraries}"]
        return cached("emulated.so", [*link, "-ltorch_cpu", "-lc10"], EMULATION)


def _find_shared_memory(library: Path) -> None:
    """Tell the emulation where each kernel's shared memory is: its static variables."""
    nm = ["nm", "--print-size", str(library)]
    listing = subprocess.run(nm, check=True, text=True, capture_output=True).stdout
    symbols = [line.split() for line in listing.splitlines()]
    places = {words[3]: (int(words[0], 16), int(words[1], 16)) for words in symbols if words[3:]}
    tell = ctypes.CDLL(str(library)).emulated_shared
    tell.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    loaded = ctypes.cast(tell, ctypes.c_void_p).value - places["emulated_shared"][0]
    found = 0
    for name, (address, size) in places.items():
        # The variable of a function _ZX is _ZZXE and its own name.
        variable = re.fullmatch(r"_ZZ(.*_kernel.*)E\d+[a-z]+", name)
        if variable and f"_Z{variable[1]}" in places:
            tell(loaded + places[f"_Z{variable[1]}"][0], loaded + address, size)
            found += 1
    declared = sum(path.read_text().count("__shared__ ") for path in cuda_sources())
    assert found >= declared > 0, f"{found} of {declared} variables in shared memory were found"


def _dispatching(name: str) -> Callable:
    """The op's kernel for CPU tensors: the emulated one where its last argument asks for it."""
    by_cpu = torch.library.get_kernel(f"attn_ext::{name}", "CPU")
    emulated = getattr(torch.ops.attn_ext_cuda, name)

    def kernel(keyset, *arguments):
        if arguments[-1] == "cuda":
            return emulated(*arguments)
        return by_cpu.call_boxed(keyset, *arguments)

    return kernel


@functools.cache
def install(*definitions: str) -> torch.library.Library:
    """Make backend "cuda" compute on CPU tensors in this process."""
    from attn_ext import backends, ops

    path = build(*definitions)
    torch.ops.load_library(str(path))
    _find_shared_memory(path)
    library = torch.library.Library("attn_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that these kernels override others
        for op in OPS:
            name = getattr(ops, op)._opname
            library.impl(name, _dispatching(name), "CPU", with_keyset=True, allow_override=True)
    problem = backends.problem
    backends.problem = lambda name, device: None if name == "cuda" else problem(name, device)
    return library


def pytest_load_initial_conftests() -> None:
    import helpers

    install(*os.environ.get("ATTN_EXT_EMULATED_DEFINITIONS", "").split())
    helpers.BACKEND_DEVICES.clear()
    helpers.BACKEND_DEVICES["cuda"] = "cpu"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator:
    """Skip what asks the backend for float64, which it refuses."""
    try:
        return (yield)
    except (RuntimeError, ValueError) as error:
        if "float64" in str(error) and "backend" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise
