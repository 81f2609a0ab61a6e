"""What the kernels' machine code says of their speed, with no GPU at hand.

    python -m benchmarks.static [--quick] [--json PATH]

Compiles every row of ``benchmarks.static_cases`` for NVIDIA sm_80, sm_90 and sm_100
and AMD gfx942 and prints registers, spills, shared memory, an occupancy estimate, and what the main
loop issues for one (i, j, d) element. Every figure is counted from machine code, not measured:
``benchmarks.sass`` says what that leaves out.

The main loop: kernels also hold a direct route for magnitudes that do not factor, as a loop of its
own or as a block that an iteration may pass by. It takes two MUFU operations an element. The paired
form takes half a reciprocal, and exponentials for rows that many elements share; with one query
for all, an exponential an element. ``MOST_MUFU`` tells them apart.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import operator
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.control_flow import Loop, is_slow_path
from benchmarks.ptx import argument_load_widths
from benchmarks.sass import (
    Counts,
    Instruction,
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
CASE_MODULES = ("benchmarks.tanh_yardstick", "benchmarks.static_cases")
YARDSTICK = "libdevice.tanh"
# What benchmarks.tanh_yardstick stands for: the loop that torch.compile emits for sm_90.
TORCH_COMPILE_SLOTS = 20.75
# MUFU operations an element, by regime: what takes more is the direct route.
MOST_MUFU = {"all": 0.9, "long": 0.9, "memory": 0.9, "step": 1.9, "pool": 4.5}
TANH_APPROX_CEILING = 16  # elements a clock an SM: one MUFU.TANH each


@dataclass
class Figures:
    """One kernel for one target; what a target has no counterpart for is None."""

    kernel: str
    regime: str  # "step", "pool" or "all"
    pass_: str
    dtype: str
    dim: int
    target: str
    num_warps: int
    registers: int  # a thread (a work item)
    spills: int  # instructions that access local memory; on AMD spilled registers
    shared: int  # bytes a CTA
    per_element: bool  # whether its main loop is over elements
    routes: tuple[str, ...] = ()  # of alternative sets of passes those it is in; none: all
    occupancy: Occupancy | None = None
    element: PerElement | None = None  # of the main loop
    ceiling: float | None = None  # elements a clock an SM
    around: float | None = None  # slots an element outside the main loop, where it is known
    # Of each pointer that is loaded from: bytes a lane -> number of loads.
    load_widths: dict[str, dict[int, int]] | None = None
    loop_spills: int = 0  # of the spills, those in innermost loops that take reciprocals


@functools.cache
def load_cases() -> list:
    """All rows, the yardstick among them.

    What a row has: ``benchmarks.tanh_yardstick.static_cases`` shows it. ``elements_per_iteration``
    is of one CTA, 0 where elements are not what a kernel loops over. Optional are ``iterations``
    of the main loop for each of the loop around it, and ``routes`` (see :func:`backward_sums`).
    """
    return [case for name in CASE_MODULES for case in importlib.import_module(name).static_cases()]


@dataclass(frozen=True)
class Leaf:
    """A number, pointer or constant among a kernel's arguments, of which some are structs."""

    path: tuple[int, ...]  # as Triton counts: of arguments, and of fields of structs
    name: str
    value: object


def leaves(arguments: dict[str, object]) -> Iterator[Leaf]:
    """Arguments, or their types, with structs taken apart but for constant ones."""

    def parts(path: tuple[int, ...], name: str, value: object) -> Iterator[Leaf]:
        if isinstance(value, tuple) and not name.isupper():
            for number, (field, part) in enumerate(zip(value._fields, value)):
                is_row = field == "ptr" or field.startswith("by_")  # of triton_kernels.rows.Rows
                yield from parts((*path, number), f"{name}_{field}" if is_row else field, part)
        else:
            yield Leaf(path, name, value)

    for number, (name, value) in enumerate(arguments.items()):
        yield from parts((number,), name, value)


def compile_case(case, target: str):
    """Compile one row for one of ``TARGETS``; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    uses_ptx = TARGETS[target][0] == "cuda"
    constants = dict(case.constants)
    for key, value in case.constants.items():
        if hasattr(value, "USE_PTX"):
            constants[key] = value._replace(USE_PTX=uses_ptx)
    if "USE_PTX" in constants:
        constants["USE_PTX"] = uses_ptx
    names = list(case.signature)
    # In order: Triton's cache on disk goes by the text of these, and the order of a set is another
    # one in each process.
    paths = sorted((names.index(key),) if isinstance(key, str) else key for key in case.aligned)
    aligned = {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(case.kernel, case.signature, constants, aligned)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": True,  # said explicitly: Triton's default is about to change
    }
    if TARGETS[target][0] == "cuda" and getattr(case, "most_registers", None):
        options["maxnreg"] = case.most_registers
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def main_loop(
    kernel: Kernel, elements: float, regime: str
) -> tuple[Loop, list[Instruction]] | None:
    """The main loop and what one of its iterations issues; None where none takes reciprocals.

    Of the loops of the paired form it is the one with most reciprocals an element (direct loops
    over smaller tiles have few), then that of the largest tile, whose elements share exponentials
    with most others. Without any, the cheapest loop.

    Args:
        kernel: for NVIDIA.
        elements: how many an iteration is for, of one warp.
        regime: "step" or "all".
    """
    most = MOST_MUFU[regime]
    loops = []
    for loop in kernel.loops:
        instructions = usual_path(loop, elements, most)
        element = per_element(Counts.of(instructions), elements)
        if element.reciprocals >= 0.25:
            loops.append((element, loop, instructions))
    paired = [found for found in loops if found[0].mufu <= most]
    if paired:
        return max(paired, key=lambda found: (found[0].reciprocals, -found[0].mufu))[1:]
    return min(loops, key=lambda found: found[0].slots)[1:] if loops else None


def usual_path(loop: Loop, elements: float, most_mufu: float) -> list[Instruction]:
    """What an iteration issues while magnitudes factor."""

    def is_direct(block: Sequence[Instruction]) -> bool:
        return is_slow_path(block) or per_element(Counts.of(block), elements).mufu > most_mufu

    return loop.straight(is_direct)


def spills_in_loops(kernel: Kernel) -> int:
    """Instructions that access local memory in innermost loops that take reciprocals."""
    parents = [loop.parent for loop in kernel.loops]
    found = 0
    for loop in kernel.loops:
        names = Counts.of(kernel.flow.instructions_of(loop.body)).names
        if loop not in parents and names["MUFU.RCP"]:
            found += names["LDL"] + names["STL"]
    return found


def slots_around(kernel: Kernel, loop: Loop, case, elements: float) -> float | None:
    """Slots an element issued once for all iterations of the main loop, if the row says how many.

    They are those of an iteration of the loop around it, or else of all that is in no loop.
    """
    iterations = getattr(case, "iterations", 0)
    if not iterations:
        return None
    if loop.parent:
        around = usual_path(loop.parent, elements, MOST_MUFU[case.regime])
    else:
        looped = set().union(*(other.body for other in kernel.loops))
        around = kernel.flow.instructions_of(set(kernel.flow.order) - looped)
    return per_element(Counts.of(around), elements).slots / iterations


def load_widths(case, ptx: str) -> dict[str, dict[int, int]]:
    """For each pointer that is loaded from: bytes a lane -> number of loads."""
    arguments = [leaf for leaf in leaves(case.signature) if leaf.value != "constexpr"]
    pointers = [leaf.name if leaf.value.startswith("*") else None for leaf in arguments]
    return {name: dict(widths) for name, widths in argument_load_widths(ptx, pointers).items()}


def figures_of(case, target: str) -> Figures:
    """Compile one row for one target and read the result."""
    compiled = compile_case(case, target)
    shared = compiled.metadata.shared
    common = (case.name, case.regime, case.pass_, case.dtype, case.dim, target, case.num_warps)
    elements = case.elements_per_iteration / case.num_warps
    routes = tuple(getattr(case, "routes", ()))
    backend, arch, _ = TARGETS[target]
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{what}:\s*(\d+)", text)[1])
            for what in ("vgpr_count", "vgpr_spill_count")
        )
        return Figures(*common, registers, spills, shared, elements > 0, routes=routes)
    kernel = disassemble(compiled.asm["cubin"])[compiled.metadata.name]
    shared += kernel.shared
    figures = Figures(*common, kernel.registers, kernel.spills, shared, elements > 0)
    figures.routes, figures.loop_spills = routes, spills_in_loops(kernel)
    figures.occupancy = kernel.occupancy(32 * case.num_warps, compiled.metadata.shared)
    figures.load_widths = load_widths(case, compiled.asm["ptx"])
    if elements and (main := main_loop(kernel, elements, case.regime)):
        loop, instructions = main
        figures.element = per_element(Counts.of(instructions), elements)
        figures.ceiling = figures.element.ceiling(arch)
        figures.around = slots_around(kernel, loop, case, elements)
    return figures


def _figures_in_worker(job: tuple[int, str]) -> Figures:
    index, target = job
    case = load_cases()[index]
    try:
        return figures_of(case, target)
    except Exception as problem:
        row = f"{case.name} ({case.pass_}, {case.dtype}, D={case.dim})"
        raise RuntimeError(f"{row} for {target}: {problem}") from problem


def collect(
    targets: Sequence[str], dtypes: Sequence[str], dims: Sequence[int], kernel: str, jobs: int
) -> list[Figures]:
    """The figures of all rows that the (empty: any) filters let through; the yardstick always."""

    def is_wanted(case) -> bool:
        right_size = not dims or case.dim in dims
        return right_size and (not dtypes or case.dtype in dtypes) and kernel in case.name

    work = [
        (index, target)
        for index, case in enumerate(load_cases())
        if case.name == YARDSTICK or is_wanted(case)
        for target in targets
    ]
    # Not forked: Triton and PyTorch have threads by now.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_figures_in_worker, work, chunksize=4))


def backward_sums(rows: Sequence[Figures]) -> Iterator[Figures]:
    """The all-at-once backward as one row a route: passes added, of a pass's variants the heaviest.

    Routes are alternatives, as for short and long sequences; a pass without any is in each.
    """
    passes = [
        row
        for row in rows
        if row.regime == "all" and row.pass_.startswith("backward") and row.element
    ]
    routes = list(dict.fromkeys(route for row in passes for route in row.routes)) or [""]
    groups: dict[tuple, dict[str, Figures]] = {}
    for row in passes:
        for route in row.routes or routes:
            held = groups.setdefault((row.dtype, row.dim, row.target, route), {})
            if row.pass_ not in held or row.element.slots > held[row.pass_].element.slots:
                held[row.pass_] = row
    for (dtype, dim, target, route), held in groups.items():
        yield _sum_of_passes(list(held.values()), dtype, dim, target, route)


def _sum_of_passes(
    parts: Sequence[Figures], dtype: str, dim: int, target: str, route: str
) -> Figures:
    around = [part.around for part in parts]
    return Figures(
        kernel=f"sum of {len(parts)} passes",
        regime="all",
        pass_="backward",
        dtype=dtype,
        dim=dim,
        target=target,
        num_warps=0,
        registers=max(part.registers for part in parts),
        spills=sum(part.spills for part in parts),
        loop_spills=sum(part.loop_spills for part in parts),
        shared=max(part.shared for part in parts),
        per_element=True,
        routes=(route,) if route else (),
        element=functools.reduce(operator.add, (part.element for part in parts)),
        ceiling=1 / sum(1 / part.ceiling for part in parts),
        around=None if None in around else sum(around),
    )


HEADER = (
    ("kernel", "regime", "pass", "dtype", "D", "target")
    + ("regs", "spills", "in loops", "shared", "CTAs", "warps", "limit")
    + ("slots", "around", "MUFU", "rcp", "el/clk", "x tanh", "loads")
)


def table(rows: Sequence[Figures]) -> str:
    """The figures for reading, and what they predict."""
    tanh = {row.target: row.ceiling for row in rows if row.kernel == YARDSTICK}
    cells = [HEADER]
    for row in rows:
        cells.append(
            (
                " ".join((row.kernel, *row.routes)),
                row.regime,
                row.pass_,
                row.dtype,
                str(row.dim),
                row.target,
            )
            + tuple(map(str, (row.registers, row.spills, row.loop_spills, row.shared)))
            + _occupancy_cells(row.occupancy)
            + _element_cells(row, tanh.get(row.target))
            + (_load_cell(row.load_widths),)
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, "", LEGEND])


LEGEND = f"""\
Counted from machine code, not measured. regs a thread, shared in bytes a CTA, CTAs and warps an SM
(estimate). Of the main loop, for one (i, j, d) element: issue slots, MUFU operations, reciprocals;
around: the share of slots issued outside it, reductions and softmax, where its length is known.
el/clk: elements a clock an SM at most, by issue slots (128), FP32 units and MUFU units (16).
x tanh: that ceiling over the same of {YARDSTICK}, compiled alike, in this table (torch.compile
emits {TORCH_COMPILE_SLOTS} slots for it on sm_90: {128 / TORCH_COMPILE_SLOTS:.2f} el/clk). \
tanh.approx, less accurate, can reach {TANH_APPROX_CEILING} el/clk.
loads: bytes a lane of each width in which the kernel loads queries, keys and values."""


def _occupancy_cells(occupancy: Occupancy | None) -> tuple[str, ...]:
    if occupancy is None:
        return ("", "", "")
    return (str(occupancy.ctas), str(occupancy.warps), occupancy.limit)


def _element_cells(row: Figures, tanh: float | None) -> tuple[str, ...]:
    if row.element is None:
        return ("",) * 6
    # A backward does more than a tanh, and a step waits for memory: no ratio.
    comparable = tanh and (row.regime, row.pass_) == ("all", "forward")
    ratio = f"{row.ceiling / tanh:.2f}" if comparable else ""
    return (
        f"{row.element.slots:.2f}",
        "" if row.around is None else f"+{row.around:.2f}",
        *(f"{n:.2f}" for n in (row.element.mufu, row.element.reciprocals, row.ceiling)),
        ratio,
    )


def _load_cell(widths: dict[str, dict[int, int]] | None) -> str:
    shown = {name: (widths or {}).get(f"{name}_ptr") for name in ("query", "key", "gate", "value")}
    return " ".join(
        f"{name} {'+'.join(str(width) for width in sorted(found, reverse=True))}"
        for name, found in shown.items()
        if found
    )


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
