"""Fixtures of the whole suite."""

import os
from collections.abc import Callable, Iterator
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


def backend_parameters(*without: str) -> list:
    """The backends to test; those on a GPU have its marker."""
    marks = {"cuda": [pytest.mark.gpu]}
    return [
        pytest.param(name, marks=marks.get(device, []))
        for name, device in BACKEND_DEVICES.items()
        if name not in without
    ]


@pytest.fixture(params=backend_parameters())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, its device the default one; a missing backend is a visible skip."""
    with default_device(BACKEND_DEVICES[require_backend(request.param)]):
        yield request.param


@pytest.fixture(params=backend_parameters("reference"))
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend with kernels of its own, its device the default one."""
    with default_device(BACKEND_DEVICES[require_backend(request.param)]):
        yield request.param


def default_device(device: str) -> AbstractContextManager:
    """Make tensors on ``device``; for the CPU, where they are anyway, without a torch mode."""
    return nullcontext() if device == "cpu" else torch.device(device)


def shrink_tiles(set_attribute: Callable[[object, str, object], None]) -> None:
    """Smaller tiles in Triton's interpreter, whose time goes by the operations of a program."""
    from attn_ext.triton_kernels import configurations

    scores = configurations.Tiles(warps=1, queries=8, keys=8, features=4, value_features=8)
    for name in ("SCORES", "DVALUE", "DVALUE_FLOAT32"):
        set_attribute(configurations, name, scores)
    set_attribute(configurations, "GRADIENT_ROW_TILES", 2)


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Where nothing asks for those of the table."""
    if BACKEND_DEVICES.get("triton") == "cpu" and "table_tiles" not in request.fixturenames:
        shrink_tiles(monkeypatch.setattr)


if BACKEND_DEVICES.get("triton") == "cpu":
    from triton.runtime import interpreter

    # Triton patches its language in every call of a device function, which takes longer than the
    # function: once a module and launch is enough.
    _patched: set[str] = set()

    def _patch_once(function: Callable, patch=interpreter._patch_lang):
        if function.__module__ not in _patched:
            _patched.add(function.__module__)
            return patch(function)

    def _launch(self, *args, launch=interpreter.GridExecutor.__call__, **kwargs):
        _patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch

CASES_INTERPRETED = 8


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In Triton's interpreter, CASES_INTERPRETED evenly spread cases of each test, or all.

    All take an hour: ATTN_EXT_TEST_ALL=1.
    """
    if BACKEND_DEVICES.get("triton") != "cpu" or os.environ.get("ATTN_EXT_TEST_ALL") == "1":
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "thread" in item.name:  # the interpreter has one, and is not safe with more
            continue
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for of_test in cases.values():
        step = max(1.0, len(of_test) / CASES_INTERPRETED)
        kept.update(of_test[int(n * step)] for n in range(min(len(of_test), CASES_INTERPRETED)))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def table_tiles():
    """Keep the table of configurations as it is."""


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
