"""A parsed kernel as Python functions, one for each piece of straight code."""

import collections
import itertools
import re

import numpy as np

from .codegen import Codegen
from .operands import SPECIAL
from .parser import Instr, Kernel, Unsupported

DONE = 1 << 30  # the piece after the last, of threads that have ended
ENDS = ("bra", "ret", "exit", "trap")
SPECIAL_PREFIXES = {f"{name.split('.')[0]}." for name in SPECIAL}


class Piece:
    """Instructions [begin, end) from one label or branch to the next."""

    def __init__(self, begin: int, end: int):
        self.begin, self.end = begin, end
        # How it ends: ("bra", piece, predicate's row, negated), ("bar", ...), ("exit", ...), None.
        self.last: tuple | None = None
        self.full = self.masked = None  # functions for all threads and for those of a mask


class Counts:
    """What warps issued: executions of each piece, and requests to memory by kind."""

    def __init__(self, pieces: int):
        self.warps = np.zeros(pieces, np.int64)
        self.memory: collections.Counter = collections.Counter()


def is_barrier(op: str) -> bool:
    """Of all threads of a block."""
    return op.startswith(("bar.sync", "barrier.sync", "barrier.cta.sync"))


def ends_piece(instr: Instr) -> bool:
    return instr.op.split(".")[0] in ENDS or is_barrier(instr.op)


class Program:
    """A kernel cut into pieces, each translated when it first runs."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.codegen = kernel, Codegen(kernel)
        cuts = {kernel.labels[i.args[0]] for i in kernel.code if i.op.split(".")[0] == "bra"}
        cuts |= {number + 1 for number, instr in enumerate(kernel.code) if ends_piece(instr)}
        cuts = sorted(cuts | {0, len(kernel.code)})
        self.pieces = [Piece(begin, end) for begin, end in itertools.pairwise(cuts)]
        starts = {piece.begin: number for number, piece in enumerate(self.pieces)}
        for piece in self.pieces:
            piece.last = self._end_of(kernel.code[piece.end - 1], starts)
        self.texts: dict[tuple[int, bool], str] = {}
        for instr in kernel.code:  # registers get their rows before the files are made
            for operand in re.findall(r"%[\w@$]+|\w+@\d+", f"{instr.pred} {instr.args}"):
                if f"{operand}." not in SPECIAL_PREFIXES and operand not in SPECIAL:
                    self.codegen.row(operand)

    def _end_of(self, instr: Instr, starts: dict[int, int]) -> tuple | None:
        name = instr.op.split(".")[0]
        pred = self.codegen.row(instr.pred)[1] if instr.pred else None
        if name == "bra":
            return "bra", starts[self.kernel.labels[instr.args[0]]], pred, instr.negated
        if name in ENDS:
            return "trap" if name == "trap" else "exit", DONE, pred, instr.negated
        if is_barrier(instr.op):
            if pred is not None or len(instr.args) > 1 or instr.args[0] != "0":
                raise Unsupported(f"{instr.op} {instr.args}")
            return "bar", None, None, False
        return None

    def function(self, number: int, masked: bool, namespace: dict):
        """A piece's function of the mask, or, not ``masked``, of None."""
        if (number, masked) not in self.texts:
            self.texts[number, masked] = self._text(self.pieces[number], masked)
        code = compile(
            self.texts[number, masked], f"<{self.kernel.name} piece {number}>", "exec"
        )  # fmt: skip
        scope: dict = {}
        exec(code, namespace, scope)
        return scope["piece"]

    def _text(self, piece: Piece, masked: bool) -> str:
        lines = ["def piece(m):"]
        for instr in self.kernel.code[piece.begin : piece.end]:
            if ends_piece(instr):
                continue
            try:
                lines += [f"    {line}" for line in self.codegen.statements(instr, masked)]
            except (KeyError, ValueError, StopIteration) as problem:
                where = f"line {instr.line}: {instr.op} {instr.args}"
                raise Unsupported(f"{where}: {problem!r}") from problem
        return "\n".join([*lines, "    return"])

    def executed(self, counts: Counts):
        """(instruction, warps that issued it) of all that ran."""
        for piece, warps in zip(self.pieces, counts.warps.tolist()):
            for instr in self.kernel.code[piece.begin : piece.end] if warps else ():
                yield instr, warps
