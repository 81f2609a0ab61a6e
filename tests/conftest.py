"""Fixtures of the whole suite."""

import pytest
import torch
from helpers import BACKEND_DEVICES

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
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of this machine in turn; one that is missing is a visible skip."""
    return require_backend(request.param)


@pytest.fixture(params=[name for name in BACKEND_DEVICES if name != "reference"])
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """Every backend with kernels of its own."""
    return require_backend(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of the backend that the test runs on."""
    fixture = "backend" if "backend" in request.fixturenames else "kernel_backend"
    return BACKEND_DEVICES[request.getfixturevalue(fixture)]


def require_backend(name: str) -> str:
    problem = backends.problem(name, torch.device(BACKEND_DEVICES[name]))
    if problem is not None:
        pytest.skip(f"backend {name}: {problem}")
    return name


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
