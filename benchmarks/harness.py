"""Interleaved timing and peak memory, with results checked before any time is taken."""

import ctypes
import functools
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import attn_ext

from . import providers
from .floors import OPERATIONS_A_CLOCK
from .workloads import Inputs, Workload, make_inputs

MODES = ("forward", "backward", "both")
# Peers sum in other orders than the plain formula does; they are only checked to be sane.
PEER_ALLOWANCE = 20
# Of a result's scale, in its dtype.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ROUND_SECONDS, MOST_CALLS = 0.02, 32
CAPTURED = "+graph"  # ends the name of a provider whose calls are replayed as one CUDA graph
COLD_FACTOR = 3  # the copies of a cold workload's inputs are so many times as large as the cache
MOST_COPIES = 16
CPU_CACHE = 32 << 20  # bytes of L3 that the cores of most server processors share


@dataclass
class Timing:
    """Seconds of one provider in one mode."""

    median: float
    low: float
    high: float
    rounds: int
    processor: float  # median of the process's processor time, which other processes do not add to
    system: float  # of that, the operating system's, for page faults above all
    faults: float  # median of the pages that a call had to be given


class Spent(NamedTuple):
    """What a call took."""

    seconds: float
    processor: float
    system: float
    faults: float

    @staticmethod
    def until_now() -> "Spent":
        """By this process, seconds since some moment."""
        use = resource.getrusage(resource.RUSAGE_SELF)
        return Spent(time.perf_counter(), use.ru_utime + use.ru_stime, use.ru_stime, use.ru_minflt)

    def since(self, start: "Spent") -> "Spent":
        return Spent(*(now - then for now, then in zip(self, start, strict=True)))


class Case:
    """One provider on one workload: its forward, and its gradients for a fixed output gradient.

    With several copies of the inputs, calls take them in turn.
    """

    def __init__(self, name: str, workload: Workload, copies: list[Inputs], doutput: Tensor):
        self.name, provider = name, name.removesuffix(CAPTURED)
        self.is_captured = name != provider
        self.is_peer = provider in providers.PEERS
        self.is_padded = provider in providers.PADDED
        self.doutput = doutput
        self.input_bytes = copies[0].bytes
        self.error = math.nan  # the largest share of the error budget, once checked
        self._runs = [providers.make_run(provider, workload, inputs) for inputs in copies]
        self._leaves = [providers.leaves(provider, inputs) for inputs in copies]
        self._calls = 0
        self._spent: list[Spent] = []
        self._replay: tuple[str, Callable[[], object], object] | None = None

    def output(self, copy: int = 0) -> Tensor:
        return self._runs[copy]()

    def gradients(self, output: Tensor, copy: int = 0, again: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self._leaves[copy], self.doutput, retain_graph=again)

    def call(self, mode: str, copy: int = 0) -> object:
        if mode == "forward":
            with torch.no_grad():
                return self.output(copy)
        return self.gradients(self.output(copy), copy)

    def seconds(self, mode: str, calls: int = 1) -> float:
        """Mean time of ``calls`` calls in a row."""
        if self.is_captured:
            return self._replayed_seconds(mode, calls)
        if mode != "backward":
            return self._elapsed(lambda: self.call(mode, self._next()), calls)
        taken = 0.0
        for _ in range(calls):
            copy = self._next()
            output = self.output(copy)
            taken += self._elapsed(functools.partial(self.gradients, output, copy))
        return taken / calls

    def timed(self, mode: str, calls: int) -> Spent:
        """What ``calls`` calls in a row take in the mean."""
        self._spent = []
        taken = self.seconds(mode, calls)
        copies = len(self._runs) if self.is_captured else 1
        sums = [sum(figure) / (calls * copies) for figure in zip(*self._spent, strict=True)]
        return Spent(*sums)._replace(seconds=taken)

    def release(self) -> None:
        """Free a captured graph and the memory it holds."""
        self._replay = None

    def _next(self) -> int:
        self._calls += 1
        return self._calls % len(self._runs)

    def _elapsed(self, work: Callable[[], object], calls: int = 1) -> float:
        _synchronize(self.doutput)
        start = Spent.until_now()
        for _ in range(calls):
            work()
        _synchronize(self.doutput)
        self._spent.append(Spent.until_now().since(start))
        return self._spent[-1].seconds / calls

    def _replayed_seconds(self, mode: str, calls: int) -> float:
        """The same for replays of one graph that holds a call on each copy of the inputs."""
        if self._replay is None or self._replay[0] != mode:
            self._replay = (mode, *self._capture(mode))
        return self._elapsed(self._replay[1], calls) / len(self._runs)

    def _capture(self, mode: str) -> tuple[Callable[[], object], object]:
        """Runs ``mode`` on every copy, on a CUDA device as one graph, and what that refers to.

        Raises:
            AssertionError: run so, it does not give what it gave outside the graph.
        """
        record = self._graph if self.doutput.is_cuda else self._in_turn
        replay, results, expected, outputs = record(mode)
        replay()
        for copy, pair in enumerate(zip(results, expected, strict=True)):
            for found, wanted in zip(*map(_tensors, pair), strict=True):
                error = (found.double() - wanted).abs().max().item()
                # Sums may be in another order, no more.
                allowed = PEER_ALLOWANCE * ROUNDING[wanted.dtype] * wanted.abs().max().item()
                if not error <= allowed:
                    text = f"replayed, copy {copy} is off by {error:.2e}, not {allowed:.2e}"
                    raise AssertionError(f"{self.name}, {mode}: {text}")
        return replay, (outputs, results)

    def _in_turn(self, mode: str) -> tuple[Callable[[], None], list, list, list | None]:
        """What runs ``mode`` on every copy, where it leaves results; results and outputs now."""
        outputs, results = self._outputs(mode), []

        def run() -> None:
            results[:] = self._all_copies(mode, outputs)

        return run, results, self._all_copies(mode, outputs), outputs

    def _graph(self, mode: str) -> tuple[Callable[[], None], list, list, list | None]:
        """The same as one CUDA graph."""
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._outputs(mode)
            for _ in range(3):
                expected = self._all_copies(mode, outputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = self._all_copies(mode, outputs)
        return graph.replay, results, expected, outputs

    def _outputs(self, mode: str) -> list[Tensor] | None:
        """One output a copy for a backward that is timed alone."""
        return [self.output(n) for n in range(len(self._runs))] if mode == "backward" else None

    def _all_copies(self, mode: str, outputs: list[Tensor] | None) -> list[object]:
        if outputs is None:
            return [self.call(mode, copy) for copy in range(len(self._runs))]
        return [self.gradients(output, copy, again=True) for copy, output in enumerate(outputs)]


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: backward runs on the streams of its forward and of its leaves."""
    return torch.cuda.Stream()


def make_cases(
    workload: Workload, names: list[str], dtype: torch.dtype, device: str
) -> dict[str, Case]:
    """Make and check one case a provider, all on the same numbers; leave out peers that fail."""
    inputs = make_inputs(workload, dtype, device)
    rows = inputs.query.shape[:-1]
    doutput = torch.randn(*rows, workload.value_dim, generator=torch.Generator().manual_seed(9))
    doutput = doutput.to(device, dtype)
    copies = [inputs]
    if workload.cold:
        wanted = math.ceil(COLD_FACTOR * cache_bytes(device) / inputs.bytes)
        copies += [inputs.copy() for _ in range(1, min(wanted, MOST_COPIES))]
    cases = {name: Case(name, workload, copies, doutput) for name in names}
    return check(cases, inputs, bool(workload.steps))


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    return CPU_CACHE


def check(cases: dict[str, Case], inputs: Inputs, is_loop: bool) -> dict[str, Case]:
    """The cases that run; raise unless their outputs and gradients keep the error budget.

    Against float64, the error may be 2 times (output) or 3 times (gradients) that of the plain
    formula in the same dtype, plus a rounding of the result's scale; peers get more. A peer that
    does not run here, for want of memory say, is named and left out.
    """
    doutput = next(iter(cases.values())).doutput
    exact = _by_sequence(inputs, doutput, is_loop, torch.float64)
    plain = _by_sequence(inputs, doutput, is_loop, doutput.dtype)
    rounding = ROUNDING[doutput.dtype]
    names = ["output", "dquery", "dkey", "dvalue", "dscore_weight"]
    if len(exact) < len(names):
        names.remove("dvalue")
    usable = {}
    for provider, case in cases.items():
        results = _results(provider, case, inputs, is_loop)
        if results is None:
            continue
        shares = {}
        for name, result, truth, eager in zip(names, results, exact, plain, strict=True):
            error, allowed = ((found - truth).abs().max().item() for found in (result, eager))
            allowed = allowed * (2 if name == "output" else 3) + rounding * truth.abs().max().item()
            shares[name] = error / allowed if error else 0.0
            if not shares[name] <= (PEER_ALLOWANCE if case.is_peer else 1):
                raise AssertionError(f"{provider}: {name} is off by {error:.2e}, not {allowed:.2e}")
        case.error = max(shares.values())
        usable[provider] = case
    return usable


def _results(provider: str, case: Case, inputs: Inputs, is_loop: bool) -> list[Tensor] | None:
    """Output and jagged gradients of a case; None for a peer that does not run."""
    try:
        output = case.output()
        gradients = case.gradients(output)
    except RuntimeError as error:
        if not case.is_peer:
            raise
        print(f"{provider}: does not run here: {str(error).splitlines()[0]}", flush=True)
        return None
    return [output.detach(), *(_unpad(gradients, inputs, is_loop) if case.is_padded else gradients)]


def _by_sequence(
    inputs: Inputs, doutput: Tensor, is_loop: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and gradients by the reference, one sequence at a time."""
    queries, douts = (
        rows.unbind(1) if is_loop else rows.split(inputs.cu_seqlens_q.diff().tolist())
        for rows in (inputs.query, doutput)
    )
    sizes = inputs.cu_seqlens_k.diff().tolist()
    tied = inputs.value is inputs.key
    key_side = [
        rows.split(sizes) for rows in ((inputs.key,) if tied else (inputs.key, inputs.value))
    ]
    results = []
    for query, dout, *keys in zip(queries, douts, *key_side, strict=True):
        tensors = (query, *keys, inputs.score_weight)
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        context = attn_ext.reference.additive_attention(
            leaves[0][None], leaves[1][None], leaves[-2][None], leaves[-1]
        )[0]
        gradients = torch.autograd.grad(context, leaves, dout.to(dtype))
        results.append((context.detach(), *gradients))
    contexts, dqueries, *dkeys, dweights = zip(*results, strict=True)
    join = (lambda rows: torch.stack(rows, 1)) if is_loop else torch.cat
    return join(contexts), join(dqueries), *map(torch.cat, dkeys), torch.stack(dweights).sum(0)


def _unpad(gradients: tuple[Tensor, ...], inputs: Inputs, is_loop: bool) -> list[Tensor]:
    dquery, *dkeys, dweight = gradients
    valid = slice(None) if inputs.padding_mask is None else ~inputs.padding_mask
    rows = (grad[valid].flatten(0, -2) for grad in dkeys)
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
        single = min(case.seconds(mode) for _ in range(3))
        calls[name] = max(1, min(MOST_CALLS, int(ROUND_SECONDS / single)))
    spent: dict[str, list[Spent]] = {name: [] for name in cases}
    end = time.perf_counter() + budget
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            for name, case in cases.items():
                spent[name].append(case.timed(mode, calls[name]))
    finally:
        gc.enable()
        for case in cases.values():
            case.release()
    timings = {}
    for name, rows in spent.items():
        seconds, *others = zip(*rows, strict=True)
        timings[name] = Timing(
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            len(seconds),
            *map(statistics.median, others),
        )
    return timings


def measured_peaks(device: str) -> dict[str, float]:
    """Multiply-adds and copied bytes (read + written) a second that this machine reaches.

    Of NVIDIA's GPUs also the special-function operations that their highest clock allows.
    """
    side, bytes_each = (4096, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    matrix = torch.randn(side, side, device=device)
    source = torch.ones(bytes_each // 4, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            _synchronize(matrix)
            start = time.perf_counter()
            work()
            work()
            _synchronize(matrix)
            taken.append((time.perf_counter() - start) / 2)
        return min(taken)

    peaks = {
        "multiply_adds_per_second": side**3 / best(lambda: matrix @ matrix),
        "copied_bytes_per_second": 2 * bytes_each / best(lambda: target.copy_(source)),
    }
    properties = torch.cuda.get_device_properties(0) if device == "cuda" else None
    if hasattr(properties, "clock_rate") and torch.version.hip is None:
        clocks = properties.clock_rate * 1e3 * properties.multi_processor_count
        peaks["special_functions_per_second"] = clocks * OPERATIONS_A_CLOCK
    return peaks


def peak_memory(case: Case, mode: str, device: str) -> int:
    """Bytes that a call holds at its peak beyond what was held before, its results included."""
    output = case.output() if mode == "backward" else None

    def run() -> object:
        return case.call(mode) if output is None else case.gradients(output)

    return peak_of(run, device)


def peak_of(run: Callable[[], object], device: str) -> int:
    """The same of what ``run`` does."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    # Memory that the allocator or the CPU backend have kept would hide the peak.
    ctypes.CDLL(None).malloc_trim(0)
    if hasattr(torch.ops.attn_ext, "cpu_empty_cache"):
        torch.ops.attn_ext.cpu_empty_cache()
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
