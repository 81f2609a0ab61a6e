"""Which kernel argument each global load of Triton's PTX reads, and in which width.

Machine code reuses registers, so that an address is hard to trace there; in PTX each register has
one meaning. ptxas keeps the width of a load.
"""

import re
from collections import Counter
from collections.abc import Sequence

_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+),\s*\[\w+_param_(\d+)\]")
_LOAD = re.compile(
    r"ld\.global[\w.:]*?(?:\.v(?P<lanes>[248]))?\.[bfsu](?P<bits>8|16|32|64)\s+"
    r"[^\[;]*\[\s*(?P<address>%\w+)"
)
_COPY = re.compile(
    r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^\]]*\],\s*\[\s*(?P<address>%\w+)[^\]]*\],"
    r"\s*(?P<bytes>\w+)"
)
_DEFINITION = re.compile(r"^\s*(?:@!?%\w+\s+)?(?!ld|atom)[a-z][\w.]*\s+(%rd\d+),\s*(.*);", re.M)


def argument_load_widths(ptx: str, arguments: Sequence[str | None]) -> dict[str, Counter]:
    """For each argument the widths, in bytes, of the loads from it, with their number.

    Args:
        ptx: of one kernel.
        arguments: names of the kernel's parameters, in the order of the PTX; None for what is no
            pointer.
    """
    origins: dict[str, set[str]] = {}  # register -> pointers it is computed from
    for register, number in _PARAMETER.findall(ptx):
        if int(number) < len(arguments) and (name := arguments[int(number)]):
            origins[register] = {name}
    definitions = [(to, re.findall(r"%rd\d+", rest)) for to, rest in _DEFINITION.findall(ptx)]
    changed = True
    while changed:  # loops carry addresses back
        changed = False
        for to, sources in definitions:
            found = set().union(origins.get(to, ()), *(origins.get(s, ()) for s in sources))
            changed |= found != origins.get(to, set())
            origins[to] = found
    widths: dict[str, Counter] = {}
    loads = [
        (load["address"], int(load["lanes"] or 1) * int(load["bits"]) // 8)
        for load in _LOAD.finditer(ptx)
    ]
    loads += [(copy["address"], int(copy["bytes"], 0)) for copy in _COPY.finditer(ptx)]
    for address, width in loads:
        for argument in origins.get(address, ()):
            widths.setdefault(argument, Counter())[width] += 1
    return widths
