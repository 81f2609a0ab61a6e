"""What calls issue on a GPU, counted by executing their machine code: every kernel of every launch.

    python -m benchmarks.dynamic [--backend cuda] [--dim 1024] [--case 28x28 gnmt-128] [--sample 16]

Runs bfloat16 calls of jagged sequences through the launchers on ``tests.ptx``, block by block. For
each launch: issue slots for one (i, j, d) element of a real pair, MUFU operations, sectors of
global and conflicts of shared memory, occupancy. A mixture of lengths is represented by a sample:
its sequences in order of their pairs, the middle ones of equal parts of that order, and a batch is
that sample repeated. Its makespan is that of its blocks dealt to multiprocessors: in order, each to
the one with fewest blocks of those with room, whose blocks share its issue slots evenly; ideal is
the same work on all of them to the end. Kernels that are given an order of their tiles have theirs
in it. What slots leave out: see :mod:`benchmarks.sass`.
"""

import argparse
import contextlib
import heapq
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # compiled, not interpreted

import numpy as np
import torch

import attn_ext
from attn_ext.triton_kernels import configurations
from attn_ext.triton_kernels.forward import PROGRAMS
from benchmarks.executed import MachineCode
from benchmarks.workloads import WORKLOADS
from tests.ptx import run_triton
from tests.ptx.machine import Machine

TARGETS = ("sm_80", "sm_90")
PROCESSORS = 132
SCHEDULERS = 4  # of a multiprocessor: slots a clock
CLOCK_GHZ = 1.755
ONE_OF = 384  # sequences that a single one stands for where tiles go by how many there are


class MachineByBlock(Machine):
    """Runs one block at a time and notes what each of them ran."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, threads_at_once=1, **options)
        self.counts.blocks = []

    def _reset(self, batch: np.ndarray) -> None:
        super()._reset(batch)
        self.counts.blocks.append(self.counts.warps.copy())  # before this block


@dataclass
class Launch:
    """One launch: what its blocks issued."""

    name: str
    slots: np.ndarray  # of each block
    opcodes: Counter
    memory: Counter
    resident: int  # blocks that a multiprocessor holds
    order: str  # "": as sequences come; "sorted": most work first; "dealt": so, by rows.dealt()

    @property
    def special_functions(self) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith("MUFU"))

    @property
    def sectors(self) -> int:
        return self.memory["global loads: sectors"] + self.memory["global stores: sectors"]


def described(launch: tuple, has_order: bool) -> tuple[str, str, int, int, str]:
    """Of a session's launch: name, PTX, threads, dynamic shared memory, order of blocks."""
    if isinstance(launch[0], str):  # CUDA C++
        name, *_, threads, ptx = launch
        return name, ptx, threads, 0, "sorted" if has_order else ""
    case, *_, compiled = launch
    is_sorted = case.signature.get("order_ptr", "constexpr") != "constexpr"
    is_sorted &= case.name in ("fwd", "grad")  # others write it
    shared = compiled.metadata.shared
    order = "dealt" if is_sorted else ""
    return case.name, compiled.asm["ptx"], 32 * case.num_warps, shared, order


def launches_of(session, target: str) -> list[Launch]:
    codes: dict[int, MachineCode] = {}
    found = []
    has_order = any(launch[0] == "order_kernel" for launch in session.launches)
    for launch in session.launches:
        _, _, program, counts, *_ = launch
        name, ptx, threads, shared, order = described(launch, has_order)
        if id(program) not in codes:
            codes[id(program)] = MachineCode(ptx, program, target)
        code = codes[id(program)]
        before = [*counts.blocks, counts.warps]
        slots = [code.slots(after - b).total() for b, after in zip(before, before[1:])]
        resident = code.kernel.occupancy(threads, shared).ctas
        opcodes = code.slots(counts.warps)
        found.append(Launch(name, np.array(slots), opcodes, counts.memory, resident, order))
    return found


@contextlib.contextmanager
def triton_execution(target: str, repeats: int) -> Iterator:
    score_tiles = configurations.score_tiles
    session = run_triton.TritonSession(target, PROCESSORS, watch_races=False, count=True)
    with (
        mock.patch.object(
            configurations, "score_tiles", lambda rows, *rest: score_tiles(rows * repeats, *rest)
        ),
        mock.patch.object(run_triton, "Machine", MachineByBlock),
        run_triton.triton_execution(session),
    ):
        yield session


@contextlib.contextmanager
def cuda_execution(target: str, repeats: int) -> Iterator:
    from tests.ptx import run_cuda

    # Launchers split work as far as it is little beside the multiprocessors: a batch's share.
    os.environ["ATTN_EXT_EMULATED_PROCESSORS"] = str(-(-PROCESSORS // repeats))
    session = run_cuda.CudaSession(int(target[3:]), watch_races=False, count=True)
    with (
        mock.patch.object(run_cuda, "Machine", MachineByBlock),
        run_cuda.cuda_execution(session),
    ):
        yield session


EXECUTIONS = {"triton": triton_execution, "cuda": cuda_execution}


def run(backend: str, lengths_q, lengths_k, most: int, dim: int, target: str, repeats: int = 1):
    """Launches of forward and of backward of a batch, as they are where it is part of a larger
    batch that repeats it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)

    def offsets(lengths) -> torch.Tensor:
        return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))

    rows_q, rows_k = sum(lengths_q), sum(lengths_k)
    inputs = draw(rows_q, dim), draw(rows_k, dim), draw(rows_k, dim), draw(dim, scale=dim**-0.5)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with EXECUTIONS[backend](target, repeats) as session:
        context = attn_ext.additive_attention(
            *leaves,
            cu_seqlens_q=offsets(lengths_q),
            cu_seqlens_k=offsets(lengths_k),
            max_seqlen_q=most,
            max_seqlen_k=most,
            backend=backend,
        )
        forward = len(session.launches)
        torch.autograd.grad(context, leaves, draw(*context.shape))
    launches = launches_of(session, target)
    return launches[:forward], launches[forward:]


def sampled(lengths_q, lengths_k, count: int) -> list[tuple[int, int]]:
    """So many sequences that stand for equal parts of all, in an order that says nothing."""
    pairs = sorted(zip(lengths_q, lengths_k, strict=True), key=lambda pair: pair[0] * pair[1])
    chosen = [pairs[len(pairs) * (2 * i + 1) // (2 * count)] for i in range(count)]
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    return [chosen[i] for i in shuffled]


def makespan(slots: np.ndarray, resident: int) -> float:
    """Clocks until the last of the blocks is done."""
    # Of each multiprocessor the service that each of its blocks has had, the time of that, and
    # the blocks' ends in service.
    service, since = [0.0] * PROCESSORS, [0.0] * PROCESSORS
    running: list[list[float]] = [[] for _ in range(PROCESSORS)]
    events: list[tuple[float, int, int]] = []  # (time, processor, version)
    version = [0] * PROCESSORS

    def advance(p: int, now: float) -> None:
        if running[p]:
            service[p] += (now - since[p]) * SCHEDULERS / len(running[p])
        since[p] = now

    def plan(p: int, now: float) -> None:
        version[p] += 1
        if running[p]:
            left = (running[p][0] - service[p]) * len(running[p]) / SCHEDULERS
            heapq.heappush(events, (now + max(left, 0.0), p, version[p]))

    now = 0.0
    for block in slots:
        p = min(range(PROCESSORS), key=lambda p: len(running[p]))
        while len(running[p]) >= resident:
            now, done, planned = heapq.heappop(events)
            if planned == version[done]:
                advance(done, now)
                heapq.heappop(running[done])
                plan(done, now)
                p = done
        advance(p, now)
        heapq.heappush(running[p], service[p] + float(block))
        plan(p, now)
    while events:
        now, done, planned = heapq.heappop(events)
        if planned == version[done]:
            advance(done, now)
            heapq.heappop(running[done])
            plan(done, now)
    return now


def batch_blocks(launch: Launch, repeats: int) -> np.ndarray:
    """The blocks of a batch in which each sequence of the sample comes so many times."""
    if launch.name.startswith(("sum_", "merge_dweight")):  # one sum for all
        return launch.slots
    slots = launch.slots[launch.slots > launch.slots.max() / 50]  # without those that end at once
    if not launch.order:
        return np.tile(slots, repeats)
    slots = np.sort(np.repeat(slots, repeats))[::-1]
    if launch.order == "sorted":
        return slots
    if launch.name != "grad":
        at_once = len(slots) <= PROCESSORS * PROGRAMS.value
        return slots[dealt(len(slots))] if at_once else slots
    # Its programs, as many as are resident, take one after the other.
    slots = slots[dealt(len(slots))]
    programs = PROCESSORS * launch.resident
    return np.array([slots[p::programs].sum() for p in range(min(programs, len(slots)))])


def dealt(count: int) -> np.ndarray:
    """As ``rows.dealt`` has it."""
    turn, place = np.divmod(np.arange(count), PROCESSORS)
    more = count % PROCESSORS
    rotated = (place - more) % PROCESSORS
    whole = np.where(turn % 2 == 0, rotated, PROCESSORS - 1 - rotated)
    is_last = (turn + 1) * PROCESSORS > count
    return turn * PROCESSORS + np.where(is_last, more - 1 - place, whole)


def report(name: str, launches: list[Launch], elements: int, repeats: int = 0) -> None:
    """Print what launches issue; with ``repeats`` also how that is spread over multiprocessors."""
    total = sum(launch.slots.sum() for launch in launches)
    print(f"{name}: {32 * total / elements:.2f} slots an element, {len(launches)} launches")
    for launch in launches:
        memory = launch.memory
        conflicts = sum(
            memory[f"shared {what}: transactions"] - memory[f"shared {what}: at least"]
            for what in ("loads", "stores")
        )
        print(
            f"  {launch.name}: {32 * launch.slots.sum() / elements:.2f} slots, "
            f"{32 * launch.special_functions / elements:.2f} MUFU, "
            f"{32 * launch.sectors / elements:.2f} bytes in sectors, "
            f"{conflicts} bank conflicts, {launch.resident} blocks of {len(launch.slots)} resident"
        )
    if not repeats:
        return
    blocks = [(batch_blocks(launch, repeats), launch.resident) for launch in launches]
    spans = [makespan(slots, resident) for slots, resident in blocks]
    ideals = [slots.sum() / (PROCESSORS * SCHEDULERS) for slots, _ in blocks]
    each = ", ".join(
        f"{launch.name} {span / ideal:.2f}"
        for launch, span, ideal in zip(launches, spans, ideals, strict=True)
    )
    microseconds = sum(spans) / CLOCK_GHZ / 1e3
    print(
        f"  makespan {microseconds:.1f} us at {CLOCK_GHZ} GHz and a slot a clock and scheduler, "
        f"{sum(spans) / sum(ideals):.2f} of ideal ({each})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = ["28x28", "12x15", "75x75", "gnmt-128", "gnmt-384"]
    parser.add_argument("--case", nargs="*", default=cases, help="QxK, or gnmt-B: a mixture")
    parser.add_argument("--dim", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--sample", type=int, default=16, help="sequences that stand for a mixture")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--backend", choices=EXECUTIONS, default="triton")
    options = parser.parse_args()
    if options.backend == "cuda":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from tests.ptx import run_cuda

        run_cuda.preload(["-m", "benchmarks.dynamic", *sys.argv[1:]])
    for dim in options.dim:
        for case in options.case:
            repeats = 0
            if case.startswith("gnmt"):
                workload = WORKLOADS["gnmt-384"]
                both = workload.query_lengths, workload.key_lengths
                pairs = sampled(*both, options.sample)
                most, repeats = max(map(max, both)), int(case.split("-")[1]) // options.sample
            else:
                pairs = [tuple(map(int, case.split("x")))]
                most = max(pairs[0])
            elements = sum(q * k for q, k in pairs) * dim
            modes = run(options.backend, *zip(*pairs), most, dim, options.target, repeats or ONE_OF)
            for mode, launches in zip(("forward", "backward"), modes, strict=True):
                name = f"{case} D={dim} {options.backend} {options.target} {mode}"
                report(name, launches, elements, repeats)
            print(flush=True)


if __name__ == "__main__":
    main()
