"""Fixtures of the whole suite."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from helpers import BACKEND_DEVICES, require_backend

from attn_ext import backends

# Workers of pytest-xdist share the cores; tests that need more threads ask for them.
torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    lines = []
    for name, device in BACKEND_DEVICES.items():
        problem = backends.problem(name, torch.device(device))
        lines.append(f"backend {name}: {'tested' if problem is None else f'SKIPPED, {problem}'}")
    return lines


@pytest.fixture(params=BACKEND_DEVICES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, its device the default one; a missing backend is a visible skip."""
    with default_device(BACKEND_DEVICES[require_backend(request.param)]):
        yield request.param


@pytest.fixture(params=[name for name in BACKEND_DEVICES if name != "reference"])
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend with kernels of its own, its device the default one."""
    with default_device(BACKEND_DEVICES[require_backend(request.param)]):
        yield request.param


def default_device(device: str) -> AbstractContextManager:
    """Make tensors on ``device``; for the CPU, where they are anyway, without a torch mode."""
    return nullcontext() if device == "cpu" else torch.device(device)


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """Fill memory that ``torch.empty`` returns, in C++ too, with NaN (integers: the maximum)."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # filling depends on it
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
