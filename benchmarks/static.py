"""What the kernels' machine code says of their speed, with no GPU at hand.

    python -m benchmarks.static [--quick] [--json PATH]

Compiles every row of ``attn_ext.triton_kernels.static_cases`` for NVIDIA sm_80, sm_90 and sm_100
and AMD gfx942 and prints registers, spills, shared memory, an occupancy estimate, and what the main
loop issues for one (i, j, d) element. Every figure is counted from machine code, not measured:
``benchmarks.sass`` says what that leaves out.

The main loop is, of the loops that take at least a quarter of a reciprocal an element, the one with
the fewest slots: the unfactored route for large magnitudes takes more.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.sass import (
    Counts,
    Kernel,
    MissingTool,
    Occupancy,
    PerElement,
    disassemble,
    per_element,
)

# Triton's backend, architecture and lanes of a warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
CASE_MODULES = ("benchmarks.tanh_yardstick", "attn_ext.triton_kernels.static_cases")
YARDSTICK = "libdevice.tanh"
# What benchmarks.tanh_yardstick stands for: the loop that torch.compile emits for sm_90.
TORCH_COMPILE_SLOTS = 20.75
TANH_APPROX_CEILING = 16  # elements a clock an SM: one MUFU.TANH each


@dataclass
class Figures:
    """One kernel for one target; what a target has no counterpart for is None."""

    kernel: str
    regime: str  # "step" or "all"
    pass_: str
    dtype: str
    dim: int
    target: str
    num_warps: int
    registers: int  # a thread (a work item)
    spills: int  # instructions that access local memory; on AMD spilled registers
    shared: int  # bytes a CTA
    occupancy: Occupancy | None = None
    element: PerElement | None = None  # of the main loop
    ceiling: float | None = None  # elements a clock an SM
    load_widths: dict[int, float] | None = None  # bytes a lane -> share of the bytes loops load


def load_cases() -> dict[str, object]:
    """All rows by a unique key, in their order."""
    cases: dict[str, object] = {}
    for module in CASE_MODULES:
        if importlib.util.find_spec(module) is None:
            continue
        for case in importlib.import_module(module).static_cases():
            key = f"{case.name}|{case.pass_}|{case.dtype}|{case.dim}|{len(cases)}"
            cases[key] = case
    return cases


def compile_case(case, target: str):
    """Compile one row for one of ``TARGETS``; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, case.signature, case.constants, aligned)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": True,  # said explicitly: Triton's default is about to change
    }
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def main_loop(kernel: Kernel, elements_per_warp: float) -> PerElement | None:
    """What the kernel's main loop issues an element; None where no loop takes reciprocals."""
    loops = [per_element(Counts.of(loop.straight()), elements_per_warp) for loop in kernel.loops]
    candidates = [element for element in loops if element.reciprocals >= 0.25]
    return min(candidates, key=lambda element: element.slots, default=None)


def load_widths(kernel: Kernel) -> dict[int, float]:
    """The share of each width, in bytes a lane, in the bytes that loops load from global memory."""
    moved: Counter = Counter()
    for loop in kernel.loops:
        for width, count in Counts.of(loop.straight()).global_loads.items():
            moved[width] += width * count
    return {width: n / moved.total() for width, n in moved.most_common()}


def figures_of(case, target: str) -> Figures:
    """Compile one row for one target and read the result."""
    compiled = compile_case(case, target)
    shared = compiled.metadata.shared
    common = (case.name, case.regime, case.pass_, case.dtype, case.dim, target, case.num_warps)
    backend, arch, _ = TARGETS[target]
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{what}:\s*(\d+)", text)[1])
            for what in ("vgpr_count", "vgpr_spill_count")
        )
        return Figures(*common, registers, spills, shared)
    (kernel,) = disassemble(compiled.asm["cubin"]).values()
    figures = Figures(*common, kernel.registers, kernel.spills, kernel.shared + shared)
    figures.occupancy = kernel.occupancy(32 * case.num_warps, shared)
    figures.load_widths = load_widths(kernel)
    if case.elements_per_iteration:
        figures.element = main_loop(kernel, case.elements_per_iteration / case.num_warps)
    if figures.element:
        figures.ceiling = figures.element.ceiling(arch)
    return figures


def _figures_in_worker(job: tuple[str, str]) -> Figures:
    key, target = job
    return figures_of(load_cases()[key], target)


def collect(
    targets: Sequence[str], dtypes: Sequence[str], dims: Sequence[int], kernel: str, jobs: int
) -> list[Figures]:
    """The figures of all rows that the (empty: any) filters let through; the yardstick always."""
    work = [
        (key, target)
        for key, case in load_cases().items()
        for target in targets
        if case.name == YARDSTICK
        or (not dtypes or case.dtype in dtypes)
        and (not dims or case.dim in dims)
        and kernel in case.name
    ]
    # Not forked: Triton and PyTorch have threads by now.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_figures_in_worker, work, chunksize=4))


def backward_sums(rows: Sequence[Figures]) -> Iterator[Figures]:
    """The all-at-once backward as one row: passes added, of variants of a pass the heaviest."""
    groups: dict[tuple, dict[str, Figures]] = {}
    for row in rows:
        if row.regime == "all" and row.pass_.startswith("backward") and row.element:
            passes = groups.setdefault((row.dtype, row.dim, row.target), {})
            held = passes.get(row.pass_)
            if held is None or row.element.slots > held.element.slots:
                passes[row.pass_] = row
    for (dtype, dim, target), passes in groups.items():
        parts = list(passes.values())
        total = parts[0].element
        for part in parts[1:]:
            total = total + part.element
        yield Figures(
            kernel=f"sum of {len(parts)} passes",
            regime="all",
            pass_="backward",
            dtype=dtype,
            dim=dim,
            target=target,
            num_warps=0,
            registers=max(part.registers for part in parts),
            spills=sum(part.spills for part in parts),
            shared=max(part.shared for part in parts),
            element=total,
            ceiling=1 / sum(1 / part.ceiling for part in parts),
        )


HEADER = (
    ("kernel", "regime", "pass", "dtype", "D", "target")
    + ("regs", "spills", "shared", "CTAs", "warps", "limit")
    + ("slots", "MUFU", "rcp", "el/clk", "x tanh", "loads")
)


def table(rows: Sequence[Figures]) -> str:
    """The figures for reading, and what they predict."""
    tanh = {row.target: row.ceiling for row in rows if row.kernel == YARDSTICK}
    cells = [HEADER]
    for row in rows:
        cells.append(
            (row.kernel, row.regime, row.pass_, row.dtype, str(row.dim), row.target)
            + (str(row.registers), str(row.spills), str(row.shared))
            + _occupancy_cells(row.occupancy)
            + _element_cells(row, tanh.get(row.target))
            + (_load_cell(row.load_widths),)
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, "", LEGEND])


LEGEND = f"""\
Counted from machine code, not measured. regs a thread, shared in bytes a CTA, CTAs and warps an SM
(estimate). Of the main loop, for one (i, j, d) element: issue slots, MUFU operations, reciprocals.
el/clk: elements a clock an SM at most, by issue slots (128), FP32 units and MUFU units (16).
x tanh: that ceiling over the same of {YARDSTICK}, compiled alike, in this table (torch.compile
emits {TORCH_COMPILE_SLOTS} slots for it on sm_90: {128 / TORCH_COMPILE_SLOTS:.2f} el/clk). \
tanh.approx, less accurate, can reach {TANH_APPROX_CEILING} el/clk.
loads: bytes a lane of the global loads in loops, with their share of the bytes."""


def _occupancy_cells(occupancy: Occupancy | None) -> tuple[str, ...]:
    if occupancy is None:
        return ("", "", "")
    return (str(occupancy.ctas), str(occupancy.warps), occupancy.limit)


def _element_cells(row: Figures, tanh: float | None) -> tuple[str, ...]:
    if row.element is None:
        return ("",) * 5
    # A backward does more than a tanh: no ratio.
    ratio = f"{row.ceiling / tanh:.2f}" if tanh and row.pass_ == "forward" else ""
    element = (row.element.slots, row.element.mufu, row.element.reciprocals, row.ceiling)
    return (*(f"{figure:.2f}" for figure in element), ratio)


def _load_cell(widths: dict[int, float] | None) -> str:
    return " ".join(f"{width}B:{share:.0%}" for width, share in (widths or {}).items())


def main() -> None:
    parser = argparse.ArgumentParser(description="What the kernels' machine code says, with no GPU")
    parser.add_argument("--quick", action="store_true", help="only sm_90")
    parser.add_argument("--target", nargs="*", choices=TARGETS, help="only these")
    parser.add_argument("--dtype", nargs="*", default=(), help="only these: bf16 fp16 fp32")
    parser.add_argument("--dim", nargs="*", type=int, default=(), help="only these feature sizes")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        # Triton has read it, or is about to, and would interpret instead of compile.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.static", *sys.argv[1:]])
    targets = arguments.target or (["sm_90"] if arguments.quick else list(TARGETS))
    try:
        rows = collect(targets, arguments.dtype, arguments.dim, arguments.kernel, arguments.jobs)
    except MissingTool as problem:
        parser.error(str(problem))
    rows += backward_sums(rows)
    if arguments.json:
        note = "counted from machine code, not measured"
        content = {"note": note, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
