"""Reads NVIDIA machine code (SASS): resources, control flow, loops and what a loop issues.

Needs no GPU: only ``cuobjdump`` and ``nvdisasm``, which Triton's wheel carries.

    python -m benchmarks.sass FILE [--arch sm_90]    a cubin, a fat object, an executable or a .so

What is counted, and what is not. Every instruction that a warp issues is one *slot*, predicated
off or not, and a packed one (``FFMA2``) is one slot as well. An SM of these architectures has four
schedulers, each of which issues at most one slot a clock, so an SM does at most 128 lane
operations a clock. Waiting (for memory, barriers, operands), instructions that hold their pipe for
longer than a clock (integer multiply, conversion, shuffle), bank conflicts and the instruction
cache are *not* in these figures: they are a ceiling counted from machine code, not a measurement.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path

from benchmarks.control_flow import ControlFlow, Loop

WARP_SIZE = 32
# Warp instructions a clock an SM issues (four schedulers), as lane operations.
ISSUE_LANES_PER_CLOCK = 128
# Lane operations a clock an SM has units for.
FP32_LANES_PER_CLOCK = {80: 64, 86: 128, 89: 128, 90: 128, 100: 128, 103: 128, 120: 128}
MUFU_LANES_PER_CLOCK = 16

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<predicate>!?U?P[T0-9]+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_MEMORY = {"LDG", "LDGSTS", "STG", "LDS", "LDSM", "STS", "STSM", "LDL", "STL", "LD", "ST"}
_FP32 = re.compile(r"F(FMA|MUL|ADD)(2|32I)?$")


class MissingTool(RuntimeError):
    """A program of the CUDA toolkit was found neither in Triton's wheel nor in PATH."""


def find_tool(name: str) -> Path:
    """The program ``name`` (cuobjdump, nvdisasm, ptxas) of Triton's wheel, or else of PATH."""
    try:
        import triton
    except ImportError:
        wheel = None
    else:
        wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if wheel.is_file():
            return wheel
    found = shutil.which(name)
    if found is None:
        raise MissingTool(
            f"{name} was found neither in Triton's wheel ({wheel or 'not installed'}) nor in PATH;"
            " `pip install triton` brings it"
        )
    return Path(found)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "P0", "!UP1"; empty where unconditional
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers, except that MUFU keeps its function: "MUFU.RCP"."""
        parts = self.opcode.split(".")
        return ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]

    @property
    def width(self) -> int:
        """Bytes a lane that a memory instruction moves; 0 for others."""
        parts = self.opcode.split(".")
        if parts[0] not in _MEMORY:
            return 0
        if parts[0] in ("LDSM", "STSM"):  # .16.M88.4: so many 8x8 matrices, 4 bytes a lane each
            return 4 * int(parts[-1]) if parts[-1] in ("2", "4") else 4
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[part] for part in parts if part in widths), 4)

    @property
    def conditional(self) -> bool:
        """Whether a jump may fall through: ``@P0 BRA x``, ``BRA P0, x``, ``BRA.U !UP0, x``."""
        return bool(self.predicate) or "," in self.operands

    @property
    def target(self) -> int | None:
        """The address that the operands end with, if any."""
        match = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands)
        return int(match[1], 16) if match else None

    def __str__(self) -> str:
        predicate = f"@{self.predicate} " if self.predicate else ""
        return f"{self.address:#06x} {predicate}{self.opcode} {self.operands}".rstrip()


@dataclass(frozen=True)
class Counts:
    """What one warp issues, by kind."""

    slots: int
    names: Counter  # by Instruction.name
    widths: dict[str, Counter]  # memory instructions: name -> bytes a lane -> how many

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> "Counts":
        names, widths = Counter(), {}
        for instruction in instructions:
            names[instruction.name] += 1
            if instruction.width:
                widths.setdefault(instruction.name, Counter())[instruction.width] += 1
        return cls(names.total(), names, widths)

    @property
    def mufu(self) -> int:
        return sum(count for name, count in self.names.items() if name.startswith("MUFU"))

    @property
    def fp32(self) -> int:
        """Slots of FFMA, FMUL and FADD; a packed one is one."""
        return sum(count for name, count in self.names.items() if _FP32.match(name))

    @property
    def fp32_operations(self) -> int:
        """As ``fp32``, a packed one counted twice: it keeps the FP32 units twice as long."""
        return self.fp32 + sum(self.names[name] for name in ("FFMA2", "FMUL2", "FADD2"))

    @property
    def global_loads(self) -> Counter:
        """Loads from global memory, through registers or straight to shared memory, by width."""
        return sum((self.widths.get(name, Counter()) for name in ("LDG", "LDGSTS")), Counter())

    @property
    def spills(self) -> int:
        """Accesses to local memory: spilled registers, or arrays that have no register."""
        return self.names["LDL"] + self.names["STL"]


@dataclass(frozen=True)
class PerElement:
    """What a loop issues for one (i, j, d) element, in lane operations."""

    slots: float
    mufu: float
    reciprocals: float
    fp32: float  # a packed instruction as the two operations that it is

    def ceiling(self, arch: int) -> float:
        """Elements a clock an SM that issue slots, FP32 units and MUFU units leave possible."""
        bounds = (
            (ISSUE_LANES_PER_CLOCK, self.slots),
            (FP32_LANES_PER_CLOCK[arch], self.fp32),
            (MUFU_LANES_PER_CLOCK, self.mufu),
        )
        return min(have / need for have, need in bounds if need)

    def __add__(self, other: "PerElement") -> "PerElement":
        """Both, one after the other: passes over the same elements."""
        return PerElement(
            self.slots + other.slots,
            self.mufu + other.mufu,
            self.reciprocals + other.reciprocals,
            self.fp32 + other.fp32,
        )


def per_element(counts: Counts, elements: float) -> PerElement:
    """Share the instructions of one iteration of one warp among its elements.

    Args:
        counts: what one warp issues in an iteration; ``Counts.of(loop.straight())``.
        elements: how many elements that iteration of that warp is for: those of an iteration of
            the CTA divided by its warps. ptxas unrolls short loops: count elements accordingly.
    """
    lanes = WARP_SIZE / elements
    return PerElement(
        counts.slots * lanes,
        counts.mufu * lanes,
        counts.names["MUFU.RCP"] * lanes,
        counts.fp32_operations * lanes,
    )


@dataclass(frozen=True)
class Limits:
    """What one SM has: CUDA programming guide, table of compute capabilities."""

    warps: int
    ctas: int
    shared: int  # bytes
    registers: int = 65536


LIMITS = {
    80: Limits(64, 32, 164 << 10),
    86: Limits(48, 16, 100 << 10),
    89: Limits(48, 24, 100 << 10),
    90: Limits(64, 32, 228 << 10),
    100: Limits(64, 32, 228 << 10),
    103: Limits(64, 32, 228 << 10),
    120: Limits(48, 24, 100 << 10),
}
_RESERVED_SHARED = 1024  # bytes a CTA that the driver keeps, from sm_80 on


@dataclass(frozen=True)
class Occupancy:
    ctas: int
    warps: int
    limit: str  # what binds: "registers", "shared memory", "warps" or "CTAs"


def occupancy(arch: int, registers: int, shared: int, threads: int) -> Occupancy:
    """An estimate of the CTAs and warps an SM holds at once.

    Args:
        arch: 80, 90, ...
        registers: a thread.
        shared: bytes a CTA, static and dynamic, without what the driver keeps.
        threads: a CTA.
    """
    limits, warps = LIMITS[arch], ceil(threads / WARP_SIZE)
    # Registers come in units of 256 a warp, from the quarter of the SM that the warp lives on.
    per_warp = ceil(max(registers, 1) * WARP_SIZE / 256) * 256
    choices = {
        "registers": 4 * (limits.registers // 4 // per_warp) // warps,
        "shared memory": limits.shared // (ceil(shared / 128) * 128 + _RESERVED_SHARED),
        "warps": limits.warps // warps,
        "CTAs": limits.ctas,
    }
    limit = min(choices, key=choices.__getitem__)
    return Occupancy(choices[limit], choices[limit] * warps, limit)


@dataclass
class Kernel:
    """One function of machine code."""

    name: str
    arch: str  # "sm_90a"
    registers: int  # a thread
    stack: int  # bytes a thread: spills and local arrays
    shared: int  # bytes a CTA, static, without what the driver keeps
    instructions: list[Instruction] = field(repr=False)

    @property
    def arch_number(self) -> int:
        return int(re.sub(r"\D", "", self.arch))

    @cached_property
    def total(self) -> Counts:
        return Counts.of(self.instructions)

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return self.total.spills

    @cached_property
    def flow(self) -> ControlFlow:
        return ControlFlow(self.instructions)

    @property
    def loops(self) -> list[Loop]:
        """All loops by address; ``loop.children`` are the loops inside it."""
        return self.flow.loops

    @property
    def innermost_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if not loop.children]

    def occupancy(self, threads: int, dynamic_shared: int = 0) -> Occupancy:
        """See :func:`occupancy`; Triton's shared memory is all dynamic."""
        return occupancy(self.arch_number, self.registers, self.shared + dynamic_shared, threads)


def _run_cuobjdump(path: Path, *arguments: str) -> str:
    find_tool("nvdisasm")  # cuobjdump starts it
    tool = find_tool("cuobjdump")
    done = subprocess.run([tool, *arguments, path], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"cuobjdump cannot read {path}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _without_code(name: str, arch: str, use: dict[str, int]) -> Kernel:
    kernel = Kernel(name, arch, use["REG"], use["STACK"], use["SHARED"], [])
    if kernel.arch_number >= 90 and kernel.shared >= _RESERVED_SHARED:
        kernel.shared -= _RESERVED_SHARED  # which cuobjdump includes from sm_90 on
    return kernel


def disassemble(binary: bytes | str | Path, arch: str | None = None) -> dict[str, Kernel]:
    """Read every function of a cubin, or of a file that holds cubins.

    Args:
        binary: the bytes of a cubin, or the path of a cubin, object, executable or library.
        arch: "sm_90"; needed where the file holds the same function for several.

    Raises:
        MissingTool: there is no cuobjdump or nvdisasm.
        ValueError: the file holds no machine code, or some function more than once.
    """
    if isinstance(binary, bytes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(binary)
            return disassemble(path, arch)
    only = ["-arch", arch] if arch else []
    resources = {}
    for name, text in re.findall(
        r"^\s*Function (\S+):\n\s*(.*)$", _run_cuobjdump(binary, *only, "-res-usage"), re.M
    ):
        resources[name] = {k: int(v) for k, v in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", text)}
    kernels: dict[str, Kernel] = {}
    code = "unknown"
    for line in _run_cuobjdump(binary, *only, "-sass").splitlines():
        if match := re.match(r"\s*code for (\S+)", line):
            code = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
            if name in kernels:
                raise ValueError(
                    f"{binary} holds {name} for {kernels[name].arch} and {code}: "
                    "choose one with arch"
                )
            kernels[name] = _without_code(name, code, resources[name])
        elif match := _INSTRUCTION.match(line):
            kernels[name].instructions.append(
                Instruction(
                    int(match["address"], 16),
                    match["predicate"] or "",
                    match["opcode"],
                    match["operands"].strip(),
                )
            )
    if not kernels:
        raise ValueError(f"{binary} holds no machine code" + (f" for {arch}" if arch else ""))
    return kernels


def describe(kernel: Kernel) -> str:
    """Resources and every loop of a kernel, for reading."""
    lines = [
        f"{kernel.name} ({kernel.arch}): {kernel.registers} registers, {kernel.shared} B static "
        f"shared memory, {kernel.stack} B stack, {kernel.spills} accesses to local memory"
    ]
    for loop in kernel.loops:
        counts = Counts.of(loop.straight())
        widths = {
            name: dict(sorted(by_width.items(), reverse=True))
            for name, by_width in sorted(counts.widths.items())
        }
        common = ", ".join(f"{name} {n}" for name, n in counts.names.most_common(10))
        lines += [
            f"{'  ' * loop.depth}loop at {loop.address:#06x}: {counts.slots} slots "
            f"({len(loop.total())} with cold blocks), {counts.mufu} MUFU, {counts.fp32} FP32",
            f"{'  ' * loop.depth}  bytes a lane: {widths}",
            f"{'  ' * loop.depth}  {common}",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources and loops of machine code")
    parser.add_argument("file", type=Path, help="a cubin, object, executable or library")
    parser.add_argument("--arch", help="sm_90; needed where FILE holds several")
    parser.add_argument("--kernel", default="", help="only functions whose name contains this")
    arguments = parser.parse_args()
    try:
        kernels = disassemble(arguments.file, arguments.arch)
    except (MissingTool, ValueError) as problem:
        parser.error(str(problem))
    for name, kernel in sorted(kernels.items()):
        if arguments.kernel in name:
            print(describe(kernel))


if __name__ == "__main__":
    main()
