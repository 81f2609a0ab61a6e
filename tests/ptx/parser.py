"""PTX text of one kernel to a :class:`Kernel`: instructions, labels, parameters, variables.

Only what compilers emit for an entry function is understood; anything else is ``Unsupported``.
"""

import re
from dataclasses import dataclass, field

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
SHARED = r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.([busf]\d+)\s+([\w$]+)(?:\[(\d*)\])?"
LOCAL = r"\.local\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d+)\]"


class Unsupported(Exception):
    """The executor does not know this PTX."""


@dataclass
class Instr:
    op: str  # e.g. "fma.rn.f32"
    args: list  # operands: str, or list of str for a {vector}
    pred: str | None = None
    negated: bool = False
    line: int = 0  # of the PTX text, from 1
    where: str = ""  # "file:line" in the source, and where that was inlined


@dataclass
class Kernel:
    name: str = ""
    params: dict = field(default_factory=dict)  # name -> (offset, size)
    param_bytes: int = 0
    registers: dict = field(default_factory=dict)  # prefix or exact name -> type
    shared: dict = field(default_factory=dict)  # name -> (offset, size)
    shared_bytes: int = 0  # static
    dynamic: str | None = None  # the extern array's name
    local: dict = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict = field(default_factory=dict)  # module-scope .global/.const name -> bytes
    code: list = field(default_factory=list)  # of Instr
    labels: dict = field(default_factory=dict)  # label -> index into code
    threads: tuple | None = None  # .reqntid

    def type_of(self, register: str) -> str:
        if register in self.registers:
            return self.registers[register]
        prefix = re.match(r"(%[A-Za-z_$]+)\d+$", register)
        if prefix and prefix[1] in self.registers:
            return self.registers[prefix[1]]
        raise Unsupported(f"register {register}")


def type_size(kind: str) -> int:
    """Bytes of a type such as "f32"."""
    return SIZES[re.search(r"\d+", kind)[0]]


def split_operands(text: str) -> list:
    """At the commas that no bracket holds; {a, b} becomes a list."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        parts.append(current.strip())
    return [
        [piece.strip() for piece in p[1:-1].split(",")] if p.startswith("{") else p for p in parts
    ]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Parser:
    def __init__(self, text: str, name: str | None):
        self.kernel, self.wanted = Kernel(), name
        # Where the code being read comes from, and what blocks in braces call their registers.
        self.where, self.scopes, self.scope_count = "", [], 0
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", text)
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', self.text, re.M)
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in files}

    def parse(self) -> Kernel:
        entry = self._find_entry()
        self._module_variables(self.text[: entry.start()])
        self._parameters(entry["params"])
        begin = self.text.index("{", entry.end())
        directives = self.text[entry.end() : begin]
        if found := re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives):
            self.kernel.threads = tuple(int(n or 1) for n in found.groups())
        self._body(begin + 1)
        return self.kernel

    def _find_entry(self) -> re.Match:
        pattern = r"\.entry\s+(?P<name>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?"
        for found in re.finditer(pattern, self.text):
            if self.wanted in (None, found["name"]):
                self.kernel.name = found["name"]
                return found
        raise Unsupported(f"no entry {self.wanted}")

    def _parameters(self, text: str | None) -> None:
        offset = 0
        for part in (text or "").split(","):
            if not part.strip():
                continue
            alignment = re.search(r"\.param\s+\.align\s+(\d+)", part)
            kind = re.search(r"\.([busf]\d+)", part)[1]
            name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", part)
            size = type_size(kind) * int(name[2] or 1)
            offset = _align(offset, int(alignment[1]) if alignment else type_size(kind))
            self.kernel.params[name[1]] = (offset, size)
            offset += size
        self.kernel.param_bytes = offset

    def _module_variables(self, head: str) -> None:
        for found in re.finditer(SHARED, head):
            self._shared(*found.groups())
        pattern = (
            r"\.(global|const)\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([^}]*)\}"
        )
        for _, name, size, values in re.findall(pattern, head):
            data = bytes(int(v) for v in values.split(","))
            self.kernel.constants[name] = data.ljust(int(size), b"\0")

    def _shared(self, extern, alignment, kind: str, name: str, count: str | None) -> None:
        k = self.kernel
        if extern or count == "":
            k.dynamic = name
            return
        size = type_size(kind) * int(count or 1)
        offset = _align(k.shared_bytes, int(alignment or type_size(kind)))
        k.shared[name] = (offset, size)
        k.shared_bytes = offset + size

    def _body(self, position: int) -> None:
        text, line = self.text, self.text.count("\n", 0, position) + 1
        statement, start_line = "", line
        while position < len(text):
            c = text[position]
            position += 1
            if c == "\n":
                line += 1
                statement = self._end_line(statement)
                continue
            if not statement.strip():
                start_line = line
                if c == "{":
                    self.scopes.append({})
                    continue
                if c == "}":
                    if not self.scopes:
                        return
                    self.scopes.pop()
                    continue
            if c == ";":
                self._statement(statement.strip(), start_line)
                statement = ""
                continue
            statement += c
            if c == ":" and re.fullmatch(r"\s*[\w$%]+:", statement) and text[position] != ":":
                self.kernel.labels[statement.strip()[:-1]] = len(self.kernel.code)
                statement = ""

    def _end_line(self, statement: str) -> str:
        """What of an unfinished statement goes on; these directives end with their line."""
        if statement.lstrip().startswith((".loc", ".pragma", ".file")):
            self._directive(statement.strip())
            return ""
        return statement and statement + " "

    def _directive(self, text: str) -> None:
        if (found := re.match(r"\.loc\s+(\d+)\s+(\d+)", text)) and found[2] != "0":
            places = [found.groups(), *re.findall(r"inlined_at\s+(\d+)\s+(\d+)", text)]
            self.where = " in ".join(f"{self.files.get(f, '?')}:{line}" for f, line in places)

    def _statement(self, text: str, line: int) -> None:
        k = self.kernel
        if not text:
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".loc", ".pragma", ".file")):
            self._directive(text)
        elif found := re.match(SHARED, text):
            self._shared(*found.groups())
        elif found := re.match(LOCAL, text):
            offset = _align(k.local_bytes, int(found[1] or 1))
            k.local[found[2]] = (offset, int(found[3]))
            k.local_bytes = offset + int(found[3])
        else:
            found = re.match(r"(?:@(!?)([%\w@$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
            if not found:
                raise Unsupported(text)
            negated, pred, op, rest = found.groups()
            args = [self._rename(a) for a in split_operands(rest)]
            pred = self._rename(pred) if pred else None
            k.code.append(Instr(op, args, pred, bool(negated), line, self.where))

    def _registers(self, text: str) -> None:
        _, kind, names = re.match(r"(\.reg)\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in map(str.strip, names.split(",")):
            if found := re.match(r"(.+)<(\d+)>$", name):
                self.kernel.registers[found[1].strip()] = kind
            elif self.scopes:  # inline assembly: other blocks may have the same name
                self.scope_count += 1
                renamed = f"{name}@{self.scope_count}"
                self.scopes[-1][name] = renamed
                self.kernel.registers[renamed] = kind
            else:
                self.kernel.registers[name] = kind

    def _rename(self, operand):
        """An operand with the names of the innermost braces."""
        if isinstance(operand, list):
            return [self._rename(o) for o in operand]
        for scope in reversed(self.scopes):
            if operand in scope:
                return scope[operand]
            inner = re.match(r"\[\s*([\w%$]+)(.*)\]$", operand)
            if inner and inner[1] in scope:
                return f"[{scope[inner[1]]}{inner[2]}]"
        return operand


def parse(text: str, name: str | None = None) -> Kernel:
    """The entry called ``name``, or the first."""
    return _Parser(text, name).parse()
