"""Lets a GPU backend compute on CPU tensors in this process."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from unittest import mock

import torch

from attn_ext import backends, ops

OPS = (
    "forward", "backward", "step_backward", "memory_backward", "pool_forward", "pool_backward",
)  # fmt: skip


@functools.cache
def _dispatch_by_name() -> torch.library.Library:
    """Ops on CPU tensors go to the backend that their last argument names."""
    library = torch.library.Library("attn_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that these kernels override others
        for op in OPS:
            name = getattr(ops, op)._opname
            library.impl(name, _kernel(name), "CPU", with_keyset=True, allow_override=True)
    return library


def _kernel(name: str):
    by_cpu = torch.library.get_kernel(f"attn_ext::{name}", "CPU")

    def kernel(keyset, *arguments):
        *own, backend = arguments
        if backend == "triton":
            launch = importlib.import_module("attn_ext.triton_kernels.launch")
            return getattr(launch, name)(*own)
        if backend == "cuda":
            return getattr(torch.ops.attn_ext_cuda, name)(*arguments)
        return by_cpu.call_boxed(keyset, *arguments)

    return kernel


@contextlib.contextmanager
def on_cpu_tensors(backend: str) -> Iterator[None]:
    """Make ``backend`` available for them."""
    _dispatch_by_name()
    problem = backends.problem

    def no_problem(name: str, device: torch.device) -> str | None:
        return None if name == backend else problem(name, device)

    with mock.patch.object(backends, "problem", no_problem):
        yield
