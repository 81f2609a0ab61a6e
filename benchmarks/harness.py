"""Interleaved timing and peak memory, with results checked before any time is taken."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import attn_ext

from . import providers
from .workloads import Inputs, Workload, make_inputs

MODES = ("forward", "backward", "both")
# Peers sum in other orders than the plain formula does; they are only checked to be sane.
PEER_ALLOWANCE = 20
ROUND_SECONDS, MOST_CALLS = 0.02, 32


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

    def seconds(self, mode: str, calls: int = 1) -> float:
        """Mean time of ``calls`` calls in a row."""
        outputs = [self.run() if mode == "backward" else None for _ in range(calls)]
        _synchronize(self.doutput)
        start = time.perf_counter()
        for output in outputs:
            if mode == "forward":
                self.forward()
            else:
                self.gradients(self.run() if output is None else output)
        _synchronize(self.doutput)
        return (time.perf_counter() - start) / calls


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
    """Raise unless every case's outputs and gradients keep the error budget of the project.

    Against float64, the error may be 2 times (output) or 3 times (gradients) that of the plain
    formula in the same dtype, plus a rounding of the result's scale; peers get more.
    """
    doutput = next(iter(cases.values())).doutput
    exact = _by_sequence(inputs, doutput, is_loop, torch.float64)
    plain = _by_sequence(inputs, doutput, is_loop, doutput.dtype)
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[doutput.dtype]
    names = ("output", "dquery", "dkey", "dvalue", "dscore_weight")
    for provider, case in cases.items():
        output = case.run()
        gradients = case.gradients(output)
        if provider in providers.PEERS:
            gradients = _unpad(gradients, inputs, is_loop)
        results = (output.detach(), *gradients)
        for name, result, truth, eager in zip(names, results, exact, plain, strict=True):
            error, allowed = ((found - truth).abs().max().item() for found in (result, eager))
            allowed = allowed * (2 if name == "output" else 3) + rounding * truth.abs().max().item()
            if provider in providers.PEERS:
                allowed *= PEER_ALLOWANCE
            if not error <= allowed:
                raise AssertionError(f"{provider}: {name} is off by {error:.2e}, not {allowed:.2e}")


def _by_sequence(
    inputs: Inputs, doutput: Tensor, is_loop: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and gradients by the reference, one sequence at a time."""
    leaves = [
        tensor.detach().to(dtype).requires_grad_()
        for tensor in (inputs.query, inputs.key, inputs.value, inputs.score_weight)
    ]
    query, key, value, score_weight = leaves
    queries = query.unbind(1) if is_loop else query.split(inputs.cu_seqlens_q.diff().tolist())
    sizes = inputs.cu_seqlens_k.diff().tolist()
    sequences = zip(queries, key.split(sizes), value.split(sizes), strict=True)
    contexts = [
        attn_ext.reference.additive_attention(q[None], k[None], v[None], score_weight)[0]
        for q, k, v in sequences
    ]
    output = torch.stack(contexts, 1) if is_loop else torch.cat(contexts)
    return output.detach(), *torch.autograd.grad(output, leaves, doutput.to(dtype))


def _unpad(gradients: tuple[Tensor, ...], inputs: Inputs, is_loop: bool) -> list[Tensor]:
    dquery, dkey, dvalue, dweight = gradients
    valid = slice(None) if inputs.padding_mask is None else ~inputs.padding_mask
    rows = (grad[valid].flatten(0, -2) for grad in (dkey, dvalue))
    return [dquery if is_loop else dquery[inputs.query_valid], *rows, dweight]


def time_cases(
    cases: dict[str, Case], mode: str, budget: float, rounds: int = 25
) -> dict[str, Timing]:
    """Time the cases in turn, round after round, until ``rounds`` or ``budget`` seconds are up.

    In a round a case runs as many calls in a row as fill ``ROUND_SECONDS``: a short one after a
    long one would find its inputs driven out of the caches, which in a model were just written.
    """
    calls = {}
    for name, case in cases.items():
        case.seconds(mode)  # not counted: first-touch and compilation
        calls[name] = max(1, min(MOST_CALLS, int(ROUND_SECONDS / case.seconds(mode))))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + budget
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            for name, case in cases.items():
                seconds[name].append(case.seconds(mode, calls[name]))
    finally:
        gc.enable()
    return {
        name: Timing(statistics.median(taken), min(taken), max(taken), len(taken))
        for name, taken in seconds.items()
    }


def measured_peaks(device: str) -> dict[str, float]:
    """Multiply-adds and copied bytes (read + written) a second that this machine reaches."""
    side, bytes_each = (4096, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    matrix = torch.randn(side, side, device=device)
    source = torch.ones(bytes_each // 4, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(10):
            _synchronize(matrix)
            start = time.perf_counter()
            work()
            _synchronize(matrix)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return {
        "multiply_adds_per_second": side**3 / best(lambda: matrix @ matrix),
        "copied_bytes_per_second": 2 * bytes_each / best(lambda: target.copy_(source)),
    }


def peak_memory(case: Case, mode: str, device: str) -> int:
    """Bytes that a call holds at its peak beyond what was held before, its results included."""
    output = case.run() if mode == "backward" else None

    def run() -> object:
        if mode == "forward":
            return case.forward()
        return case.gradients(case.run() if output is None else output)

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)  # else memory that the allocator kept would hide the peak
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
