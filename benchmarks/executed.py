"""Issue slots of an executed launch: machine code weighted by how often its PTX ran.

PTX is executed by ``tests.ptx``. To know what each of its instructions costs it is assembled again
with a line number on every instruction, ``nvdisasm`` tells of which line each machine instruction
is, and a block of machine code runs as often as most of its lines did. What a slot is, and what is
not counted: see :mod:`benchmarks.sass`.
"""

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import numpy as np
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.sass import find_tool

_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "WARPSYNC", "BSYNC", "BREAK")
# Of each of these a PTX instruction makes one, so that they tell copies of code.
_ONE_TO_ONE = frozenset(
    "FFMA FMUL MUFU LDG STG LDS STS LDSM STSM HMMA HGMMA BAR LDGSTS SHFL".split()
)
_LINE = re.compile(r'//## File ".*kernel\.ptx", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][\w.]*)\s*([^;]*);"
)


@dataclass
class Instruction:
    address: int
    opcode: str
    line: int  # of the PTX; 0: none
    target: str | None  # a label


def numbered(ptx: str, lines: set[int]) -> str:
    """The PTX with the number of each given line, and no other information of lines."""
    out: list[str] = []
    for number, line in enumerate(ptx.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith(".section"):  # of debugging; it ends the file
            break
        if stripped.startswith((".loc", ".file")):
            continue
        if stripped.startswith(".target"):
            line = re.sub(r",\s*debug", "", line)
        if number in lines:
            out.append(f".loc 1 {number} 0")
        out.append(line)
        if stripped.startswith(".address_size"):
            out.append('.file 1 "kernel.ptx"')
    return "\n".join(out) + "\n"


def assembled(ptx: str, arch: str) -> tuple[list[Instruction], dict[str, int]]:
    """The machine code of numbered PTX, and the addresses of its labels."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        # The assembler and the options of Triton's own compilation.
        ptxas = get_ptxas(int(re.search(r"\d+", arch)[0])).path
        options = ["-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={arch}"]
        subprocess.run([ptxas, *options, "-o", cubin, source], check=True, capture_output=True)
        command = [find_tool("nvdisasm"), "-g", "-c", cubin]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    line = 0
    for row in text.splitlines():
        if found := _LINE.search(row):
            line = int(found[1])
        elif found := _LABEL.match(row.strip()):
            pending.append(found[1])
        elif found := _INSTRUCTION.match(row):
            address, opcode, operands = int(found[1], 16), found[2], found[3]
            labels |= dict.fromkeys(pending, address)
            pending = []
            target = re.search(r"`\((\.L_\w+)\)", operands)
            code.append(Instruction(address, opcode, line, target and target[1]))
    return code, labels


def _blocks(code: list[Instruction], starts: set[int]) -> list[list[Instruction]]:
    blocks: list[list[Instruction]] = [[]]
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction.opcode.split(".")[0] in _ENDS:
            blocks.append([])
    return [block for block in blocks if block]


class MachineCode:
    """The machine code of a program of ``tests.ptx``.

    ``ptxas`` unrolls loops and copies code. In a block that holds k copies of a piece of PTX, each
    runs a k-th of its times; of several blocks with the same lines the one with most copies is
    taken to run, the others, remainders, not at all.
    """

    def __init__(self, ptx: str, program, arch: str):
        self.piece_of = {
            instruction.line: number
            for number, piece in enumerate(program.pieces)
            for instruction in program.kernel.code[piece.begin : piece.end]
        }
        code, labels = assembled(numbered(ptx, set(self.piece_of)), arch)
        starts = {labels[i.target] for i in code if i.target in labels}
        self.blocks = _blocks(code, starts)
        self.share = self._shares()

    def _shares(self) -> dict[tuple[int | None, int], float]:
        """(piece, block) -> the part of the piece's runs that the block has."""
        copies: dict = defaultdict(dict)  # piece -> block -> (copies, lines)
        for number, block in enumerate(self.blocks):
            counted: dict = defaultdict(Counter)
            lines: dict = defaultdict(set)
            for instruction in block:
                piece, name = self.piece_of.get(instruction.line), instruction.opcode.split(".")[0]
                lines[piece].add(instruction.line)
                if name in _ONE_TO_ONE:
                    counted[piece][instruction.line, name] += 1
            for piece, own in lines.items():
                times = median_low(counted[piece].values()) if counted[piece] else 1
                copies[piece][number] = times, {line for line, _ in counted[piece]} or own
        share = {}
        for piece, found in copies.items():
            claimed: set[int] = set()
            for number, (times, lines) in sorted(
                found.items(), key=lambda item: (-item[1][0], -len(item[1][1]))
            ):
                share[piece, number] = 1 / times if 2 * len(lines - claimed) > len(lines) else 0.0
                claimed |= lines
        return share

    def slots(self, warps: np.ndarray) -> Counter:
        """Issue slots by opcode, given how many warps ran each piece of the program."""
        total: Counter = Counter()
        for number, block in enumerate(self.blocks):
            times: Counter = Counter()
            for instruction in block:
                piece = self.piece_of.get(instruction.line)
                ran = 0 if piece is None else int(warps[piece])
                times[ran * self.share.get((piece, number), 0.0)] += 1
            runs = times.most_common(1)[0][0]
            for instruction in block:
                names = instruction.opcode.split(".")
                total[".".join(names[:2]) if names[0] == "MUFU" else names[0]] += runs
        return total
