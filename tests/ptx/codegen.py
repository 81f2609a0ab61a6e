"""PTX instructions as Python statements over NumPy rows, one row of all threads a register."""

from .emit_arithmetic import Arithmetic
from .emit_memory import MemoryAndWarps
from .parser import Instr, Unsupported


class Codegen(Arithmetic, MemoryAndWarps):
    """Statements of one kernel."""

    def statements(self, instr: Instr, masked: bool) -> list[str]:
        """For all threads, or for those in ``m``; a predicate makes its own mask ``q``."""
        lines, mask = [], "m" if masked else "None"
        if instr.pred is not None:
            held = self.source(instr.pred, "pred")
            held = f"~{held}" if instr.negated else held
            lines.append(f"q={held}&m" if masked else f"q={held}")
            mask = "q"
        where = "" if mask == "None" else f",where={mask}"
        text = self.translate(instr)
        for line in [text] if isinstance(text, str) else text:
            lines.append(line.replace("{W}", where).replace("{M}", mask))
        return lines

    def translate(self, instr: Instr):
        name, *mods = instr.op.split(".")
        method = getattr(self, "op_" + name.replace("::", "_"), None)
        if method is None:
            raise Unsupported(f"{instr.op} {instr.args}")
        self.site = self.constant(f"{instr.where} [ptx {instr.line}]")
        self.instr = instr
        return method(mods, instr.args)
