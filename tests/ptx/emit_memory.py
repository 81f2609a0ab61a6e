"""PTX instructions on memory, of warps, and of matrices as Python statements.

``{M}`` in a statement is where the mask of threads goes, or None for all.
"""

import re

import numpy as np

from .operands import Operands
from .parser import Unsupported

SPACES = ("param", "global", "shared", "local", "const")


def space_of(mods: list[str]) -> str:
    """The state space of an access; a generic address says itself where it leads."""
    if any(m.startswith("shared::cluster") for m in mods):
        raise Unsupported("shared::cluster")
    return next((m.split("::")[0] for m in mods if m.split("::")[0] in SPACES), "generic")


def vector_length(mods: list[str]) -> int:
    return next((int(m[1:]) for m in mods if m in ("v2", "v4", "v8")), 1)


def matrix_count(mods: list[str]) -> int:
    return next(int(m[1:]) for m in mods if m in ("x1", "x2", "x4"))


def product_shape(mods: list[str]) -> str:
    return next(m for m in mods if re.fullmatch(r"m\d+n\d+k\d+", m))


class MemoryAndWarps(Operands):
    """One method for each instruction, ``op_`` and its name."""

    def _sources(self, operands: list[str], kind: str) -> str:
        """A tuple's text."""
        return "(" + ",".join(self.source(o, kind) for o in operands) + ",)"

    def _targets(self, operands: list[str], kind: str) -> str:
        return "(" + ",".join(self.target(o, kind) for o in operands) + ",)"

    # ---- Memory ----

    def op_ld(self, mods, args):
        kind, count, space = mods[-1], vector_length(mods), space_of(mods)
        out = args[0] if isinstance(args[0], list) else [args[0]]
        unit = int(kind[1:]) // 8
        if space == "param":
            return self._load_parameter(out, args[1], kind, unit)
        where = self.address(args[1], space)
        signed = kind[0] == "s"
        more = ",True" if "nc" in mods else ""
        lines = [f"t=load_{space}({where},{unit},{count},{{M}},{self.site}{more})"]
        lines.append("if t is not None:")
        lines += [
            f"    spread({self.target(o, kind)},t[:,{n}],{signed},{{M}})"
            for n, o in enumerate(out)
            if o != "_"
        ]
        return [*lines, "    pass"]

    def _load_parameter(self, out: list[str], operand: str, kind: str, unit: int) -> list[str]:
        found = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", operand)
        if found:
            offset = self.kernel.params[found[1]][0] + int(found[2] or 0)
            values = [f"param({offset + n * unit},D_{kind})" for n in range(len(out))]
        else:  # an index into an array
            where = self.address(operand, "param")
            values = [f"param_at({where},{n * unit},D_{kind},{{M}})" for n in range(len(out))]
        return [f"put({self.target(o, kind)},{v},{{M}})" for o, v in zip(out, values)]

    op_ldu = op_ld

    def op_st(self, mods, args):
        kind, space = mods[-1], space_of(mods)
        values = args[1] if isinstance(args[1], list) else [args[1]]
        unit = int(kind[1:]) // 8
        texts = self._sources(values, f"b{max(2, unit) * 8}")
        where = self.address(args[0], space)
        return f"store_{space}({where},{unit},{texts},{{M}},{self.site})"

    def op_cp(self, mods, args):
        if mods[0] != "async":
            raise Unsupported(self.instr.op)
        if mods[1] == "commit_group":
            return "async_commit({M})"
        if mods[1] == "wait_group":
            return f"async_wait({int(args[0])},{{M}})"
        if mods[1] == "wait_all":
            return ["async_commit({M})", "async_wait(0,{M})"]
        if mods[1] not in ("ca", "cg"):
            raise Unsupported(self.instr.op)
        size = int(args[2], 0)
        given = self.source(args[3], "u32") if len(args) > 3 else self.constant(np.uint32(size))
        target, source = self.address(args[0], "shared"), self.address(args[1], "global")
        return f"async_copy({target},{source},{size},{given},{{M}},{self.site})"

    def _ignore(self, mods, args):
        return "pass"

    op_prefetch = op_fence = op_membar = op_setmaxnreg = op_griddepcontrol = _ignore

    # ---- Warps ----

    def op_shfl(self, mods, args):
        if mods[0] != "sync":
            raise Unsupported(self.instr.op)
        out, value, lane, clamp, members = args
        outs = out.split("|")
        target = self.target(outs[0], "b32")
        flag = self.target(outs[1], "pred") if len(outs) > 1 else "None"
        given = ",".join(self.source(s, "b32") for s in (value, lane, clamp, members))
        return f"shuffle({mods[1]!r},{target},{flag},{given},{{M}},{self.site})"

    def op_vote(self, mods, args):
        out, value, _ = args
        target = self.target(out, "b32" if mods[1] == "ballot" else "pred")
        return f"vote({mods[1]!r},{target},{self.predicate(value)},{{M}})"

    def op_activemask(self, mods, args):
        return f"active_mask({self.target(args[0], 'b32')},{{M}})"

    def op_redux(self, mods, args):
        kind = mods[-1]
        return f"redux({mods[1]!r},{self.target(args[0], kind)},{self.source(args[1], kind)},{{M}})"

    def op_bar(self, mods, args):
        """Of a warp; those of a block end a piece of code, see ``machine``."""
        if mods[0] == "warp":
            return "synchronise({M})"
        raise Unsupported(self.instr.op)

    op_barrier = op_bar

    # ---- Matrices ----

    def op_ldmatrix(self, mods, args):
        outs, where = self._targets(args[0], "b32"), self.address(args[1], "shared")
        options = f"{matrix_count(mods)},{'trans' in mods}"
        return f"load_matrix({outs},{where},{options},{{M}},{self.site})"

    def op_stmatrix(self, mods, args):
        values, where = self._sources(args[1], "b32"), self.address(args[0], "shared")
        options = f"{matrix_count(mods)},{'trans' in mods}"
        return f"store_matrix({where},{values},{options},{{M}},{self.site})"

    def op_mma(self, mods, args):
        kinds = self.kinds(mods)
        is_known = product_shape(mods) in ("m16n8k8", "m16n8k16") and "tf32" not in mods
        if not is_known or kinds[0] != "f32" or kinds[1] not in ("bf16", "f16"):
            raise Unsupported(self.instr.op)
        a, b = (self._sources(part, "b32") for part in args[1:3])
        c = self._sources(args[3], "f32")
        return f"mma({kinds[1]!r},{self._targets(args[0], 'f32')},{a},{b},{c},{{M}})"

    def op_wgmma(self, mods, args):
        if mods[0] in ("fence", "commit_group", "wait_group"):
            return "pass"
        shape = re.fullmatch(r"m64n(\d+)k16", product_shape(mods))
        kinds = self.kinds(mods)
        is_known = shape and kinds[0] == "f32" and kinds[1] in ("bf16", "f16")
        if not is_known or not isinstance(args[1], list):  # A from registers
            raise Unsupported(self.instr.op)
        outs, left = self._targets(args[0], "f32"), self._sources(args[1], "b32")
        adds = args[3]
        adds = self.source(adds, "pred") if adds.startswith("%") else str(int(adds, 0) != 0)
        sign = int(args[4], 0) * int(args[5], 0)
        n_major = int(args[-1], 0) == 1
        given = f"{shape[1]},{kinds[1]!r},{outs},{left},{self.source(args[2], 'b64')}"
        return f"wgmma({given},{adds},{sign},{n_major},{{M}},{self.site})"
