"""PTX arithmetic, comparisons, conversions and moves as Python statements.

``{W}`` in a statement is where a ufunc takes the mask of threads, ``{M}`` the mask itself.
"""

from .operands import SPECIAL, Operands
from .parser import Unsupported

COMPARE = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal", "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal",
}  # fmt: skip
BITWISE = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
LOGICAL = {"and": "logical_and", "or": "logical_or", "xor": "logical_xor"}


class Arithmetic(Operands):
    """One method for each instruction, ``op_`` and its name."""

    def _ufunc(self, function: str, kind: str, args, flush: bool = False) -> str:
        out, *sources = args
        texts = [self.source(s, kind) for s in sources]
        target = self.target(out, kind)
        if flush:
            inputs = ",".join(f"flush({t})" for t in texts)
            return f"put({target},flush({function}({inputs})),{{M}})"
        return f"{function}({','.join(texts)},{target}{{W}})"

    def _helper(self, function: str, kinds: list[str], args) -> str:
        out, *sources = args
        texts = [self.source(s, kind) for s, kind in zip(sources, kinds[1:])]
        return f"put({self.target(out, kinds[0])},{function}({','.join(texts)}),{{M}})"

    def _arithmetic(self, function: str, mods, args) -> str:
        kind = self.kinds(mods)[-1]
        if "bf16" in kind or kind == "f16x2" or "sat" in mods:
            raise Unsupported(self.instr.op)
        return self._ufunc(function, kind, args, "ftz" in mods)

    def op_add(self, mods, args):
        if "cc" in mods:
            raise Unsupported("add.cc")
        return self._arithmetic("add", mods, args)

    def op_sub(self, mods, args):
        return self._arithmetic("subtract", mods, args)

    def op_mul(self, mods, args):
        kind = self.kinds(mods)[-1]
        if "wide" in mods:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = (self.source(s, kind) for s in args[1:])
            dtype = f"D_{wide}"
            return f"multiply({a},{b},{self.target(args[0], wide)},dtype={dtype}{{W}})"
        if "hi" in mods:
            return self._helper(f"mulhi_{kind}", [kind] * 3, args)
        return self._arithmetic("multiply", mods, args)

    def op_mad(self, mods, args):
        kind = self.kinds(mods)[-1]
        if kind in ("f32", "f64"):
            return self.op_fma(mods, args)
        if "wide" in mods:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = (self.source(s, kind) for s in args[1:3])
            c = self.source(args[3], wide)
            return f"put({self.target(args[0], wide)},multiply({a},{b},dtype=D_{wide})+{c},{{M}})"
        a, b, c = (self.source(s, kind) for s in args[1:])
        if "hi" in mods:
            return f"put({self.target(args[0], kind)},mulhi_{kind}({a},{b})+{c},{{M}})"
        return f"add(multiply({a},{b}),{c},{self.target(args[0], kind)}{{W}})"

    def op_fma(self, mods, args):
        kind = self.kinds(mods)[-1]
        if mods == ["rn", "bf16x2"]:
            return self._helper("fma_bf16x2", ["b32"] * 4, args)
        if kind not in ("f32", "f64") or "sat" in mods or "rz" in mods or "rp" in mods:
            raise Unsupported(self.instr.op)
        a, b, c = (self.source(s, kind) for s in args[1:])
        if "rm" in mods:
            return f"put({self.target(args[0], kind)},fma_down({a},{b},{c}),{{M}})"
        if "ftz" in mods:
            a, b, c = f"flush({a})", f"flush({b})", f"flush({c})"
            return [
                f"fma_{kind}({a},{b},{c},TMP_F,None)",
                f"put({self.target(args[0], kind)},flush(TMP_F),{{M}})",
            ]
        return f"fma_{kind}({a},{b},{c},{self.target(args[0], kind)},{{M}})"

    def _sign_bits(self, function: str, keeps: bool, mods, args):
        """abs and neg of 16-bit floats, which are about their sign bits alone."""
        kind = mods[-1]
        if kind not in ("bf16", "bf16x2", "f16x2"):
            return self._arithmetic(function, mods, args)
        raw, signs = ("b32", 0x80008000) if kind.endswith("x2") else ("b16", 0x8000)
        bits = self.number(str(~signs if keeps else signs), raw)
        operation = "bitwise_and" if keeps else "bitwise_xor"
        return f"{operation}({self.source(args[1], raw)},{bits},{self.target(args[0], raw)}{{W}})"

    def op_neg(self, mods, args):
        return self._sign_bits("negative", False, mods, args)

    def op_abs(self, mods, args):
        return self._sign_bits("absolute", True, mods, args)

    def op_copysign(self, mods, args):
        sign, value = (self.source(s, mods[-1]) for s in args[1:])
        return f"copysign({value},{sign},{self.target(args[0], mods[-1])}{{W}})"

    def op_min(self, mods, args):
        is_float = self.kinds(mods)[-1][0] == "f" and "NaN" not in mods
        return self._arithmetic("fmin" if is_float else "minimum", mods, args)

    def op_max(self, mods, args):
        is_float = self.kinds(mods)[-1][0] == "f" and "NaN" not in mods
        return self._arithmetic("fmax" if is_float else "maximum", mods, args)

    def op_div(self, mods, args):
        kind = self.kinds(mods)[-1]
        if kind[0] == "f":
            if "full" in mods or "approx" in mods:
                flush = "True" if "ftz" in mods else "False"
                a, b = (self.source(s, kind) for s in args[1:])
                return f"put({self.target(args[0], kind)},div_approx({a},{b},{flush}),{{M}})"
            return self._ufunc("divide", kind, args, "ftz" in mods)
        return self._helper("div_int", [kind] * 3, args)

    def op_rem(self, mods, args):
        return self._helper("rem_int", [self.kinds(mods)[-1]] * 3, args)

    def _approx(self, function: str, mods, args) -> str:
        flush = "True" if "ftz" in mods else "False"
        value = f"{function}({self.source(args[1], 'f32')},{flush})"
        return f"put({self.target(args[0], 'f32')},{value},{{M}})"

    def op_ex2(self, mods, args):
        if mods[-1] != "f32":
            raise Unsupported(self.instr.op)
        return self._approx("ex2", mods, args)

    def op_lg2(self, mods, args):
        return self._approx("lg2", mods, args)

    def op_rcp(self, mods, args):
        if mods[-1] == "f64":
            raise Unsupported("rcp.f64")
        return self._approx("rcp" if "approx" in mods else "rcp_exact", mods, args)

    def op_sqrt(self, mods, args):
        return self._approx("sqrt32", mods, args)

    def op_rsqrt(self, mods, args):
        return self._approx("rsqrt32", mods, args)

    def op_tanh(self, mods, args):
        return self._approx("tanh32", mods, args)

    def op_and(self, mods, args):
        return self._bits("and", mods, args)

    def op_or(self, mods, args):
        return self._bits("or", mods, args)

    def op_xor(self, mods, args):
        return self._bits("xor", mods, args)

    def _bits(self, name: str, mods, args):
        kind = mods[-1]
        return self._ufunc((LOGICAL if kind == "pred" else BITWISE)[name], kind, args)

    def op_not(self, mods, args):
        return self._ufunc("logical_not" if mods[-1] == "pred" else "invert", mods[-1], args)

    def op_shl(self, mods, args):
        return self._helper("shl", [mods[-1], mods[-1], "u32"], args)

    def op_shr(self, mods, args):
        return self._helper("shr", [mods[-1], mods[-1], "u32"], args)

    def op_shf(self, mods, args):
        return self._helper(f"shf_{mods[0]}_{mods[1]}", ["b32"] * 3 + ["u32"], args)

    def op_bfe(self, mods, args):
        return self._helper("bfe", [mods[-1], mods[-1], "u32", "u32"], args)

    def op_bfi(self, mods, args):
        return self._helper("bfi", ["b32", "b32", "b32", "u32", "u32"], args)

    def op_popc(self, mods, args):
        return self._helper("popc", ["u32", mods[-1]], args)

    def op_clz(self, mods, args):
        return self._helper("clz", ["u32", mods[-1]], args)

    def op_brev(self, mods, args):
        return self._helper("brev", ["b32", "b32"], args)

    def op_prmt(self, mods, args):
        if len(mods) != 1:
            raise Unsupported(self.instr.op)
        return self._helper("prmt", ["b32"] * 4, args)

    def op_lop3(self, mods, args):
        if mods != ["b32"]:
            raise Unsupported(self.instr.op)
        a, b, c = (self.source(s, "b32") for s in args[1:4])
        return f"put({self.target(args[0], 'b32')},lop3({a},{b},{c},{int(args[4], 0)}),{{M}})"

    def op_selp(self, mods, args):
        kind = mods[-1]
        a, b = (self.source(s, kind) for s in args[1:3])
        held = self.source(args[3], "pred")
        return f"put({self.target(args[0], kind)},where({held},{a},{b}),{{M}})"

    def op_slct(self, mods, args):
        kind = mods[-2]
        a, b = (self.source(s, kind) for s in args[1:3])
        held = f"{self.source(args[3], mods[-1])}>=0"
        return f"put({self.target(args[0], kind)},where({held},{a},{b}),{{M}})"

    def op_setp(self, mods, args):
        compare, *rest, kind = mods
        combine = next((m for m in rest if m in LOGICAL), None)
        if "ftz" in rest:
            raise Unsupported(self.instr.op)
        if kind.endswith("x2"):
            return self._compare_halves(compare, kind[:-2], args)
        out, *others = args
        outs = out.split("|")
        a, b = (self.source(s, kind) for s in others[:2])
        if kind == "bf16":
            a, b = f"from_bf16({a})", f"from_bf16({b})"
        value = self._comparison(compare, "f" in kind, a, b)
        if len(outs) == 1 and not combine and value == f"{COMPARE.get(compare)}({a},{b})":
            return f"{COMPARE[compare]}({a},{b},{self.target(out, 'pred')}{{W}})"
        lines = [f"t={value}"]
        if combine:
            lines.append(f"h={self.predicate(others[2])}")
        for one, held in zip(outs, ("t", "~t")):
            value = f"{LOGICAL[combine]}({held},h)" if combine else held
            if one != "_":
                lines.append(f"put({self.target(one, 'pred')},{value},{{M}})")
        return lines

    def _compare_halves(self, compare: str, kind: str, args) -> list[str]:
        """Two 16-bit numbers in a register; each comparison has a predicate of its own."""
        out, *sources = args
        lines = []
        for half, one in enumerate(out.split("|")):
            a, b = (f"part_of({self.source(s, 'b32')},{half},16)" for s in sources)
            value = self._comparison(compare, True, f"from_{kind}({a})", f"from_{kind}({b})")
            if one != "_":
                lines.append(f"put({self.target(one, 'pred')},{value},{{M}})")
        return lines

    @staticmethod
    def _comparison(compare: str, is_float: bool, a: str, b: str) -> str:
        if compare == "num":
            return f"~(isnan({a})|isnan({b}))"
        if compare == "nan":
            return f"isnan({a})|isnan({b})"
        if is_float and len(compare) == 3:  # unordered: true for NaN
            return f"unordered({COMPARE[compare[:2]]},{a},{b})"
        if is_float and compare == "ne":  # ordered: false for NaN
            return f"ordered(not_equal,{a},{b})"
        return f"{COMPARE[compare]}({a},{b})"

    def op_mov(self, mods, args):
        kind, (out, value) = mods[-1], args
        if isinstance(out, list):
            size = int(kind[1:]) // len(out)
            parts = [
                f"put({self.target(one, f'b{size}')},part_of(t,{n},{size}),{{M}})"
                for n, one in enumerate(out)
                if one != "_"
            ]
            return [f"t={self.source(value, kind)}", *parts]
        if isinstance(value, list):
            size = int(kind[1:]) // len(value)
            parts = ",".join(self.source(v, f"b{size}") for v in value)
            return f"put({self.target(out, kind)},pack({size},{parts}),{{M}})"
        if value in self.kernel.constants:
            raise Unsupported(f"address of {value}")
        return f"put({self.target(out, kind)},{self.source(value, kind)},{{M}})"

    def op_cvta(self, mods, args):
        """Generic addresses of shared and local memory lie in a window of their own."""
        function, space = ("strip_window", mods[1]) if "to" in mods else ("add_window", mods[0])
        value = f"{function}({self.source(args[1], 'u64')},{space!r})"
        return f"put({self.target(args[0], 'u64')},{value},{{M}})"

    def op_cvt(self, mods, args):
        to, of = self.kinds(mods)[-2:]
        out, *sources = args
        if "relu" in mods or "rna" in mods:
            raise Unsupported(self.instr.op)
        if to in ("bf16x2", "f16x2"):
            a, b = (f"to_{to[:-2]}({self.source(s, of)})" for s in sources)
            return f"put({self.target(out, 'b32')},pack(16,{b},{a}),{{M}})"
        value = self.source(sources[0], of)
        if of == "bf16":
            value = f"from_bf16({value})"
        elif of[0] in "us" and int(of[1:]) < self._width(sources[0]):
            value = f"{value}.astype(D_{of})"
        value = self._converted(value, to, of, mods)
        return f"put({self.target(out, 'b16' if to == 'bf16' else to)},{value},{{M}})"

    def _converted(self, value: str, to: str, of: str, mods: list[str]) -> str:
        if "sat" in mods:
            if (to, of) != ("f32", "f32"):
                raise Unsupported(self.instr.op)
            return f"saturate({value})"
        if to == "bf16":
            if of != "f32" or "rn" not in mods:
                raise Unsupported(self.instr.op)
            return f"to_bf16({value})"
        to_integer = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
        if to[0] in "us" and (of[0] == "f" or of == "bf16"):
            return f"to_int({value},{to_integer!r},D_{to})"
        if to_integer:
            return f"round_float({value},{to_integer!r})"
        if any(m in mods for m in ("rz", "rm", "rp")):
            raise Unsupported(self.instr.op)
        return f"asarray({value}).astype(D_{to})"

    def _width(self, operand: str) -> int:
        """Bits of an operand."""
        return 32 if operand in SPECIAL else int(self.row(operand)[0])
