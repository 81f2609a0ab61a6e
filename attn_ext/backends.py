"""Which backends this installation has, why one is missing, and which one a call gets."""

import functools
import os
import warnings
from pathlib import Path

import torch

from .checks import mismatch, wrong_type

BACKENDS = ("triton", "cuda", "cpu", "reference")
IN_DOUBLE = ("cpu", "reference")  # those that compute in float64
OLDEST_TRITON = (3, 6)  # which torch 2.11 brings; with 3.9 the ends of the range that is tested


def _load_cpu() -> str | None:
    """Load the C++ library and return why that failed, or None."""
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_C.*so"))
    if not libraries and (folder.parent / "csrc").is_dir():
        return (
            f"Python imported attn_ext from its sources in {folder.parent}, where no C++ library "
            "was built: run in another directory, where it finds what pip installed; or, with a "
            "C++17 compiler, build there: make venv"
        )
    if not libraries:
        return (
            "the C++ library was not built; with a C++17 compiler, run in attn_ext's source "
            "directory: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"{libraries[0]} does not load ({error}); rebuild it with this torch"
    return None


_cpu_problem = _load_cpu()


@functools.cache
def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: for tests, it is very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and _triton_problem() is None


@functools.cache
def _triton_problem() -> str | None:
    """Why Triton cannot be used, or None."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    remedy = f"pip install 'triton>={oldest}'"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); {remedy}, or use backend='reference'"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {oldest}; {remedy}"
    return None


@functools.cache
def _cuda_problem() -> str | None:
    """Load the CUDA library, where torch has CUDA, and return why that failed, or None."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here; use backend='cpu' or 'reference'"
    remedy = (
        "with nvcc and this PyTorch, run in attn_ext's source directory: "
        "ATTN_EXT_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
    )
    libraries = sorted(Path(__file__).parent.glob("_C_cuda.*so"))
    if not libraries:
        return f"the CUDA library was not built; {remedy}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"{libraries[0]} does not load ({error}); {remedy}"
    return None


@torch.compiler.assume_constant_result  # a fact of the installation: nothing to trace
def problem(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot compute on ``device``, with the remedy, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it computes on CPU tensors; use .cpu() or backend=None for {device}"
        return _cpu_problem
    if backend == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and triton_interprets()):
            return (
                f"it computes on CUDA tensors; use .cuda() or backend=None for {device} "
                "(TRITON_INTERPRET=1 runs it on CPU tensors, for tests)"
            )
        return _triton_problem()
    if device.type != "cuda":
        return f"it computes on CUDA tensors; use .cuda() or backend=None for {device}"
    return _cuda_problem()


@functools.cache
def _warn_of_reference(device_type: str) -> None:
    """Say once in a process that calls for "cpu" or "cuda" run on the slow backend."""
    fast = ("cpu",) if device_type == "cpu" else ("triton", "cuda")
    reasons = (problem(name, torch.device(device_type)) for name in fast)
    message = f"attn_ext is slow here: {'; '.join(filter(None, reasons))}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


# By type of device, and whether in float64: asking every backend takes microseconds.
_best_of: dict[tuple[str, bool], str] = {}


# A constant to the compiler: were it traced, what it writes would make the next call compile again.
@torch.compiler.assume_constant_result
def _best(device: torch.device, in_double: bool) -> str:
    """The first backend in the order of BACKENDS that computes this."""
    chosen = _best_of.get((device.type, in_double))
    if chosen is None:
        fitting = (name for name in BACKENDS if not in_double or name in IN_DOUBLE)
        usable = (name for name in fitting if problem(name, device) is None)
        chosen = next(name for name in usable if name != "triton" or device.type == "cuda")
        _best_of[device.type, in_double] = chosen
    return chosen


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve the ``backend`` argument; an explicit choice never falls back to another."""
    in_double = dtype == torch.float64
    if backend is None:
        chosen = _best(device, in_double)
        # In float64 nothing else computes on a GPU.
        expected_better = device.type == "cpu" or (device.type == "cuda" and not in_double)
        if chosen == "reference" and expected_better and not torch.compiler.is_compiling():
            _warn_of_reference(device.type)
        return chosen
    if not isinstance(backend, str):
        raise wrong_type("backend", "a str or None", backend)
    if backend not in BACKENDS:
        raise mismatch("backend", f"None or one of {', '.join(BACKENDS)}", repr(backend))
    reason = problem(backend, device)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} is not available: {reason}")
    if in_double and backend not in IN_DOUBLE:
        expected = f"one of {', '.join(IN_DOUBLE)}, or None, for float64 tensors"
        raise mismatch("backend", expected, repr(backend))
    return backend
