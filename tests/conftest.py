"""Fixtures of the whole suite."""

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

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
    if os.environ.get("ATTN_EXT_TEST_ALL") != "1":
        lines.append("a few cases of some tests (see tests/conftest.py); ATTN_EXT_TEST_ALL=1: all")
    return lines


class Chosen(NamedTuple):
    """What the backend fixtures choose for a test."""

    backend: str
    isa: str | None = None  # of backend "cpu" if it is not the one that it has chosen itself


def backend_parameters(*without: str) -> list:
    """The backends to test, "cpu" with each instruction set; those on a GPU have its marker."""
    marks = {"cuda": [pytest.mark.gpu]}
    parameters = [
        pytest.param(Chosen(name), id=name, marks=marks.get(device, []))
        for name, device in BACKEND_DEVICES.items()
        if name not in without
    ]
    if "cpu" in BACKEND_DEVICES and backends.problem("cpu", torch.device("cpu")) is None:
        names = torch.ops.attn_ext.cpu_isas().split(", ")
        names.remove(torch.ops.attn_ext.cpu_isa())
        parameters += [pytest.param(Chosen("cpu", name), id=f"cpu_{name}") for name in names]
    return parameters


@pytest.fixture(params=backend_parameters())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, its device the default one; a missing backend is a visible skip."""
    with backend_in_use(request.param):
        yield request.param.backend


@pytest.fixture(params=backend_parameters("reference"))
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend with kernels of its own, its device the default one."""
    with backend_in_use(request.param):
        yield request.param.backend


@contextmanager
def backend_in_use(chosen: Chosen) -> Iterator[None]:
    with default_device(BACKEND_DEVICES[require_backend(chosen.backend)]):
        if chosen.isa is None:
            yield
            return
        before = torch.ops.attn_ext.cpu_isa()
        torch.ops.attn_ext.cpu_use_isa(chosen.isa)
        yield
        torch.ops.attn_ext.cpu_use_isa(before)


def default_device(device: str) -> AbstractContextManager:
    """Make tensors on ``device``; for the CPU, where they are anyway, without a torch mode."""
    return nullcontext() if device == "cpu" else torch.device(device)


def shrink_tiles(set_attribute: Callable[[object, str, object], None]) -> None:
    """Smaller tiles in Triton's interpreter, whose time goes by the operations of a program."""
    from attn_ext.triton_kernels import configurations

    scores = configurations.Tiles(warps=1, queries=8, keys=8, features=8, pairs=2, value_features=8)
    for name in ("SCORES", "PAIRS", "PAIRS_FLOAT32"):
        set_attribute(configurations, name, scores)
    few = configurations.replace(scores, queries=4)
    set_attribute(configurations, "SCORES_FEW", few)
    set_attribute(configurations, "GRADIENT_ROW_TILES", 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """What they compute with tiles of the table, tests/ptx executes as compiled."""
    if BACKEND_DEVICES.get("triton") == "cpu":
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

# Cases of a test where all of them would take too long or say too little, and in the interpreter.
FEW, FEW_INTERPRETED = 6, 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose among the cases of each test; ATTN_EXT_TEST_ALL=1 takes all, which is `make test-all`.

    All run on the CPU backend as it is. A few of each test run on the reference, in Triton's
    interpreter, in the emulation of CUDA and, of those marked every_isa, with the machine's other
    instruction sets.
    """
    everything = os.environ.get("ATTN_EXT_TEST_ALL") == "1"
    interpreted = BACKEND_DEVICES.get("triton") == "cpu"
    emulated = BACKEND_DEVICES.get("cuda") == "cpu"
    kept: set[pytest.Item] = set()
    few: dict[tuple[str, Chosen], list[pytest.Item]] = {}
    for item in items:
        chosen = chosen_of(item)
        if item.get_closest_marker("nightly") and not everything:
            continue
        if chosen.isa and not item.get_closest_marker("every_isa"):
            continue
        if interpreted and "thread" in item.name:  # it has one, and is not safe with more
            continue
        if interpreted and item.get_closest_marker("large") and not everything:
            continue
        if (interpreted or emulated) and torch.float64 in parameters_of(item):
            continue  # they would skip it
        if interpreted or emulated or chosen.isa or chosen.backend == "reference":
            few.setdefault((item.nodeid.partition("[")[0], chosen), []).append(item)
        else:
            kept.add(item)
    for (name, _), cases in few.items():
        own = cases[0].get_closest_marker("few")
        counts = {"interpreted": FEW_INTERPRETED, "others": FEW, **(own.kwargs if own else {})}
        most = len(cases) if everything else counts["interpreted" if interpreted else "others"]
        kept.update(spread(cases, most, seed=zlib.crc32(name.encode())))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def chosen_of(item: pytest.Item) -> Chosen:
    """What a backend fixture chooses for a test, nothing where it has none."""
    return next((p for p in parameters_of(item) if isinstance(p, Chosen)), Chosen(""))


def parameters_of(item: pytest.Item) -> list:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def spread(cases: list[pytest.Item], most: int, seed: int) -> list[pytest.Item]:
    """At most so many cases, with as many values of each parameter, then pairs of them, as can be.

    The seed says where to begin, so that different tests choose differently.
    """
    if len(cases) <= most:
        return cases

    def met_by(case: pytest.Item) -> tuple[set, set]:
        values = sorted((name, str(value)) for name, value in case.callspec.params.items())
        return {*values}, {*itertools.combinations(values, 2)}

    begin = seed % len(cases)
    left, found, seen = cases[begin:] + cases[:begin], [], set()
    while len(found) < most:
        best = max(left, key=lambda case: [len(part - seen) for part in met_by(case)])
        left.remove(best)
        found.append(best)
        seen.update(*met_by(best))
    return found


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
