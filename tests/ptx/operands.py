"""Operands of PTX instructions as Python expressions over NumPy rows.

A register is a row with a number for every thread. The rows of one width make a file, of which
generated code has a view for each type.
"""

import re
import struct

import numpy as np

from .parser import Kernel, Unsupported

# The register file as generated code sees it, by PTX type.
VIEW = {
    "b16": "B", "u16": "B", "s16": "C", "f16": "H",
    "b32": "U", "u32": "U", "s32": "I", "f32": "F",
    "b64": "Q", "u64": "Q", "s64": "L", "f64": "G",
    "pred": "P",
}  # fmt: skip
DTYPE = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_,
}  # fmt: skip
TYPES = set(DTYPE) | {"bf16", "f16x2", "bf16x2"}
SPECIAL = {
    f"%{name}.{axis}": f"{name.upper()}{axis.upper()}"
    for name in ("tid", "ntid", "ctaid", "nctaid")
    for axis in "xyz"
} | {"%laneid": "LANEID", "%warpid": "WARPID", "WARP_SZ": "WARPSZ"}


class Operands:
    """Expressions for the operands of one kernel; ``constants`` are ``K`` in generated code."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.rows: dict[str, tuple[str, int]] = {}  # register -> (class, row)
        self.counts = {"pred": 0, "16": 0, "32": 0, "64": 0}
        self.constants: list = []
        self.constant_of: dict = {}

    def row(self, name: str) -> tuple[str, int]:
        if name not in self.rows:
            kind = self.kernel.type_of(name)
            cls = "pred" if kind == "pred" else re.search(r"\d+", kind)[0]
            self.rows[name] = (cls, self.counts[cls])
            self.counts[cls] += 1
        return self.rows[name]

    def constant(self, value) -> str:
        key = (type(value), value.tobytes() if isinstance(value, np.generic) else value)
        if key not in self.constant_of:
            self.constant_of[key] = len(self.constants)
            self.constants.append(value)
        return f"K[{self.constant_of[key]}]"

    def number(self, text: str, kind: str) -> str:
        dtype = np.dtype(DTYPE.get(kind, np.uint32))
        if text in ("true", "false"):
            return self.constant(np.bool_(text == "true"))
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            bits = int(found[1], 16)
            if dtype == np.float64:
                return self.constant(np.float64(struct.unpack("<f", struct.pack("<I", bits))[0]))
            return self.constant(np.array(bits, np.uint32).view(dtype)[()])
        if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return self.constant(np.array(int(found[1], 16), np.uint64).view(dtype)[()])
        value = int(text.rstrip("Uu"), 0)
        if kind == "pred":
            return self.constant(np.bool_(value != 0))
        if dtype.kind == "f":
            return self.constant(dtype.type(value))
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return self.constant(np.array(value % (1 << 8 * dtype.itemsize), unsigned).view(dtype)[()])

    def source(self, operand: str, kind: str) -> str:
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.startswith("%") or "@" in operand or operand in self.kernel.registers:
            cls, row = self.row(operand)
            if cls == "pred":
                return f"P[{row}]"
            return f"{VIEW[self._fit(kind, cls)]}[{row}]"
        if re.fullmatch(r"-?[0-9][\w.]*|true|false", operand):
            return self.number(operand, kind)
        return self.constant(DTYPE[kind](self.symbol(operand)))

    @staticmethod
    def _fit(kind: str, cls: str) -> str:
        """A register may be wider than the instruction's type; then its own bits are meant."""
        if kind in ("bf16",):
            kind = "b16"
        if kind in ("f16x2", "bf16x2"):
            kind = "b32"
        return kind if kind[1:] == cls else f"{'s' if kind[0] == 's' else 'u'}{cls}"

    def symbol(self, name: str) -> int:
        k = self.kernel
        if name == k.dynamic:
            return (k.shared_bytes + 15) // 16 * 16 if k.shared_bytes else 0
        if name in k.shared:
            return k.shared[name][0]
        if name in k.local:
            return k.local[name][0]
        if name in k.params:  # an address in parameter space
            return k.params[name][0]
        raise Unsupported(f"symbol {name}")

    def target(self, operand: str, kind: str) -> str:
        if operand == "_":
            return "TRASH_" + VIEW[kind]
        cls, row = self.row(operand)
        return f"P[{row}]" if cls == "pred" else f"{VIEW[self._fit(kind, cls)]}[{row}]"

    def address(self, operand: str, space: str) -> str:
        inner = operand.strip("[] \t")
        found = re.fullmatch(r"([%\w$@]+)\s*((?:\s*[+-]\s*-?\w+)*)", inner)
        if not found:
            raise Unsupported(f"address {operand}")
        terms = re.findall(r"([+-])\s*(-?\w+)", found[2])
        base, offset = found[1], sum(int(f"{sign}1") * int(n, 0) for sign, n in terms)
        if base.startswith("%") or "@" in base:
            cls, row = self.row(base)
            view = "Q" if cls == "64" else "U"
            if not offset:
                return f"{view}[{row}]"
            return f"{view}[{row}]+{self.number(str(offset), 'u' + cls)}"
        if re.fullmatch(r"\d+", base):
            return f"uniform({int(base) + offset})"
        return f"uniform({self.symbol(base) + offset})"

    def predicate(self, operand: str) -> str:
        """A predicate's source, which may be negated."""
        held = self.source(operand.removeprefix("!"), "pred")
        return f"~{held}" if operand.startswith("!") else held

    @staticmethod
    def kinds(mods: list[str]) -> list[str]:
        """The types among what follows an instruction's name."""
        return [m for m in mods if m in TYPES]
