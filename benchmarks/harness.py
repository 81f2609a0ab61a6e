"""Interleaved timing and peak memory, with results checked before any time is taken."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import providers
from .workloads import Inputs, Workload, make_inputs

MODES = ("forward", "backward", "both")


@dataclass
class Timing:
    """Seconds of one provider in one mode."""

    median: float
    low: float
    high: float
    rounds: int


class Case:
    """One provider on one workload: its forward, and its gradients for a fixed output gradient."""

    def __init__(self, provider: str, workload: Workload, inputs: Inputs, doutput: Tensor):
        self.provider = provider
        self.run = providers.make_run(provider, workload, inputs)
        self.leaves = providers.leaves(provider, inputs)
        self.doutput = doutput

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run()

    def gradients(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.leaves, self.doutput)

    def seconds(self, mode: str) -> float:
        output = self.run() if mode == "backward" else None
        _synchronize(self.doutput)
        start = time.perf_counter()
        if mode == "forward":
            self.forward()
        else:
            self.gradients(self.run() if output is None else output)
        _synchronize(self.doutput)
        return time.perf_counter() - start


def make_cases(
    workload: Workload, names: list[str], dtype: torch.dtype, device: str
) -> dict[str, Case]:
    """Make and check one case a provider, all on the same numbers."""
    inputs = make_inputs(workload, dtype, device)
    rows = inputs.query.shape[:-1]
    doutput = torch.randn(*rows, workload.value_dim, generator=torch.Generator().manual_seed(9))
    doutput = doutput.to(device, dtype)
    cases = {name: Case(name, workload, inputs, doutput) for name in names}
    check(cases, inputs, bool(workload.steps))
    return cases


def check(cases: dict[str, Case], inputs: Inputs, is_loop: bool) -> None:
    """Raise unless all cases give the first one's outputs and gradients, to the dtype's noise."""
    expected = None
    for name, case in cases.items():
        output = case.run()
        gradients = case.gradients(output)
        if case.leaves[1] is inputs.padded_key:
            gradients = _unpad(gradients, inputs, is_loop)
        results = [output.detach(), *gradients]
        if expected is None:
            expected = results
            continue
        for what, ours, theirs in zip(
            ("output", "dquery", "dkey", "dvalue", "dscore_weight"), results, expected, strict=True
        ):
            error = (ours - theirs).abs().max().item()
            scale = theirs.abs().max().item()
            tolerance = 64 * torch.finfo(ours.dtype).eps
            if not error <= tolerance * scale:
                raise AssertionError(f"{name}: {what} is off by {error:.2e} (scale {scale:.2e})")


def _unpad(gradients: tuple[Tensor, ...], inputs: Inputs, is_loop: bool) -> list[Tensor]:
    dquery, dkey, dvalue, dweight = gradients
    valid = slice(None) if inputs.padding_mask is None else ~inputs.padding_mask
    rows = (grad[valid].flatten(0, -2) for grad in (dkey, dvalue))
    return [dquery if is_loop else dquery[inputs.query_valid], *rows, dweight]


def time_cases(
    cases: dict[str, Case], mode: str, budget: float, rounds: int = 25
) -> dict[str, Timing]:
    """Time the cases in turn, round after round, until ``rounds`` or ``budget`` seconds are up."""
    for case in cases.values():
        case.seconds(mode)  # not counted: first-touch and compilation
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + budget
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            for name, case in cases.items():
                seconds[name].append(case.seconds(mode))
    finally:
        gc.enable()
    return {
        name: Timing(statistics.median(taken), min(taken), max(taken), len(taken))
        for name, taken in seconds.items()
    }


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that ``run`` held at its peak beyond what was held before, its results included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes(status, "VmRSS")
    result = run()
    peak = _status_bytes(status, "VmHWM") - before
    del result
    return peak


def _status_bytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
