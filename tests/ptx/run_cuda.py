"""Runs ``backend="cuda"`` on CPU tensors: launches of csrc/cuda execute the PTX of nvcc.

The host side is compiled for the host, with the headers of tests/cuda_emulation; a launch hands the
kernel's address and its parameters to Python, which finds the kernel of the same name in the PTX.
Device pointers are host pointers. A preloaded library notes what PyTorch allocates for tensors, and
fills it with NaN.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated_cuda
import numpy as np
import torch
from emulated_cuda import EMULATION, ROOT, TARGET, cached, cuda_sources, torch_include

from .backend import on_cpu_tensors
from .machine import Machine
from .memory import Allocation, GlobalMemory, Report
from .parser import parse
from .program import Program

HOST = Path(__file__).parent / "cuda_host"
SMALL_WAVES = emulated_cuda.SMALL
MOST_TENSORS = 65536  # as track.c has it
CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, *(ctypes.c_uint,) * 4, ctypes.c_void_p, ctypes.c_size_t
)


def missing() -> str | None:
    """What running needs and this machine lacks, or None."""
    tools = ("nvcc", "g++", "gcc", "c++filt", "nm")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found" if absent else None


def tracker() -> Path:
    """The library to preload."""
    command = ["gcc", "-O2", "-shared", "-fPIC", str(HOST / "track.c"), "-ldl"]
    return cached("track.so", command, HOST)


def preload(command: list[str]) -> None:
    """Become the command with the tracker preloaded, unless this process has it."""
    library = str(tracker())
    if os.environ.get("LD_PRELOAD") != library:
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, *command])


def host_library(definitions: tuple[str, ...]) -> Path:
    """The host side of the backend."""
    flags = [
        *("g++", "-std=c++17", "-O1", "-fPIC", "-mf16c", "-mfma", "-fvisibility=hidden", "-w"),
        *("-DUSE_CUDA", TARGET, "-DATTN_EXT_CUDA_KEY=CPU", *definitions),
        *(f"-I{HOST}", f"-I{EMULATION}", f"-isystem{torch_include()}"),
    ]
    sources = [*cuda_sources(), ROOT / "csrc/cuda/registration.cpp"]
    sources += [EMULATION / "emulation.cpp", HOST / "launch.cpp"]

    def compiled(source: Path) -> str:
        command = [*flags, "-x", "c++", "-c", str(source)]
        return str(cached(f"{source.name}.o", command, EMULATION, HOST))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    return cached("executed.so", link, EMULATION, HOST)


def ptx_files(arch: int) -> list[Path]:
    """What nvcc makes of the kernels."""
    folders = [torch_include(), torch_include() / "torch/csrc/api/include", ROOT / "csrc/cuda"]
    flags = ["-DUSE_CUDA", TARGET, "-std=c++20", f"-arch=sm_{arch}", "-O3", "-lineinfo"]
    flags += [f"-I{folder}" for folder in folders]

    def compiled(source: Path) -> Path:
        return cached(f"{source.stem}.ptx", ["nvcc", "-ptx", *flags, str(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, cuda_sources()))


def demangled(names: list[str]) -> list[str]:
    """C++ names, without those of namespaces that each compiler makes up."""
    run = subprocess.run(
        ["c++filt"], check=True, input="\n".join(names), capture_output=True, text=True
    )
    hidden = r"_GLOBAL__N_\w*|\(anonymous namespace\)"
    return [re.sub(hidden, "anon", name) for name in run.stdout.splitlines()]


class HostMemory(GlobalMemory):
    """The tensors of this process at their own addresses."""

    def __init__(self, report: Report):
        super().__init__(report)
        self.tracked = ctypes.CDLL(str(tracker())).tracked
        self.tracked.restype = ctypes.c_size_t

    def refresh(self) -> None:
        """Which tensors there are now."""
        room = np.zeros((MOST_TENSORS, 2), np.uint64)
        pointer = room.ctypes.data_as(ctypes.c_void_p)
        rows = room[: self.tracked(pointer, ctypes.c_size_t(len(room)))]
        rows = rows[np.argsort(rows[:, 0])]
        self.starts, self.sizes = rows[:, 0].copy(), rows[:, 1].copy()
        self.found: dict[int, Allocation] = {}

    def _allocation(self, number: int) -> Allocation:
        if number not in self.found:
            base, size = int(self.starts[number]), int(self.sizes[number])
            bytes_ = ctypes.cast(base, ctypes.POINTER(ctypes.c_uint8))
            data = np.ctypeslib.as_array(bytes_, (size,))
            self.found[number] = Allocation(base, data, f"tensor of {size} bytes", False)
        return self.found[number]

    def _is_watched(self, allocation: Allocation) -> bool:
        return True  # any may be written

    def _by_allocation(self, addresses: np.ndarray):
        at = np.searchsorted(self.starts, addresses, "right") - 1
        for number in np.unique(at).tolist():
            yield None if number < 0 else self._allocation(number), np.flatnonzero(at == number)


class CudaSession:
    """Executes launches; ``definitions`` are macros of the host side, the rest options of
    :class:`~.machine.Machine`.
    """

    def __init__(self, arch: int = 90, definitions: tuple[str, ...] = (), **options):
        self.report, self.options = Report(), options
        self.memory, self.failure = HostMemory(self.report), None
        self.transform = lambda kernel, ptx: ptx  # damages PTX, in tests of the executor
        self.launches: list[tuple] = []  # (kernel, grid, program, counts, threads, PTX)
        self.texts: dict[str, tuple[str, str]] = {}  # kernel -> PTX, name in it
        self.programs: dict[tuple[str, str], Program] = {}
        for path in ptx_files(arch):
            text = path.read_text()
            names = re.findall(r"\.entry\s+([\w$]+)", text)
            self.texts |= {plain: (text, name) for name, plain in zip(names, demangled(names))}
        library = host_library(definitions)
        torch.ops.load_library(str(library))
        self.loaded = ctypes.CDLL(str(library))
        self.callback = CALLBACK(self._launch)
        self.loaded.ptx_set_callback(self.callback)
        self.kernel_at = self._kernel_addresses(library)

    def _kernel_addresses(self, library: Path) -> dict[int, str]:
        run = subprocess.run(["nm", str(library)], check=True, capture_output=True, text=True)
        rows = [words for line in run.stdout.splitlines() if len(words := line.split()) == 3]
        places = {name: int(place, 16) for place, _, name in rows}
        loaded = ctypes.cast(self.loaded.ptx_launch, ctypes.c_void_p).value - places["ptx_launch"]
        kernels = [name for name in places if "_kernel" in name]
        return {loaded + places[n]: plain for n, plain in zip(kernels, demangled(kernels))}

    def forget(self) -> None:
        """Between calls; the process itself knows where tensors are."""

    def _launch(self, kernel, x, y, z, threads, parameters, size) -> None:
        try:
            if self.failure is None:
                self._run(self.kernel_at[kernel], (x, y, z), threads, parameters, size)
        except BaseException as problem:  # which cannot pass through C++
            self.failure = problem

    def _run(self, kernel: str, grid: tuple, threads: int, parameters: int, size: int) -> None:
        short = re.sub(r"^void |attn_ext::cuda::|anon::|\(.*", "", kernel)
        text, name = self.texts[kernel]
        text = self.transform(short, text)
        if (text, name) not in self.programs:
            self.programs[text, name] = Program(parse(text, name))
        program = self.programs[text, name]
        assert program.kernel.param_bytes == size, (program.kernel.param_bytes, size)
        self.memory.refresh()
        machine = Machine(
            program,
            grid,
            (threads, 1, 1),
            ctypes.string_at(parameters, size),
            self.memory,
            0,
            self.report,
            **self.options,
        )
        self.launches.append((short, grid, program, machine.run(), threads, text))


@contextlib.contextmanager
def cuda_execution(session: CudaSession) -> Iterator[CudaSession]:
    """Backend "cuda" on CPU tensors, by the session."""
    with on_cpu_tensors("cuda"):
        yield session
    if session.failure is not None:
        failure, session.failure = session.failure, None
        raise failure
