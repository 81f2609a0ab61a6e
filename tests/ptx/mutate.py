"""Does the executor notice damage? Takes barriers and waits out of a kernel, one at a time.

A mutant is noticed if something is found that the whole kernel has not, if results are wrong, or if
threads wait for ever. Compilers place some barriers that no access needs, so one in four may be
missed.
"""

from .program import is_barrier


def mutate(run, run_this: tuple, dtype, kernel: str, most: int) -> tuple[str, list[str]]:
    """Of one case: ok where the whole kernel is and three in four mutants are noticed.

    Args:
        run: called as ``run(*run_this, dtype)``, gives a verdict and what is said of it.
        kernel: its name.
        most: mutants, spread over the kernel.
    """
    session = run_this[1]
    first = len(session.launches)
    verdict, said = run(*run_this, dtype)
    usual = set(session.report.found)
    places = {}  # line -> instruction, source position
    for case, _, program, counts, *_ in session.launches[first:]:
        if getattr(case, "name", case) == kernel:
            for instr, _ in program.executed(counts):
                if is_barrier(instr.op) or instr.op.startswith("cp.async.wait_"):
                    places[instr.line] = instr.op, instr.where
    if verdict == "WRONG" or not places:
        return "WRONG", [*said, f"{len(places)} barriers and waits of {kernel} ran"]
    said, missed = [f"{len(places)} barriers and waits of {kernel} ran"], 0
    chosen = sorted(places)[:: max(1, len(places) // most)]
    for line in chosen:

        def without(name: str, ptx: str, line: int = line) -> str:
            lines = ptx.splitlines()
            if name == kernel:
                lines[line - 1] = ""
            return "\n".join(lines)

        session.transform = without
        verdict, whys = run(*run_this, dtype)
        session.transform = lambda name, ptx: ptx
        kinds = sorted({kind for kind, _ in set(session.report.found) - usual})
        noticed = bool(kinds) or verdict == "WRONG"
        why = ", ".join(kinds) or (whys[1] if noticed else "")
        op, where = places[line]
        said.append(f"{'noticed' if noticed else 'MISSED'} {op} at {where} (line {line}): {why}")
        missed += not noticed
    return "MISSED" if 4 * missed > len(chosen) else "ok", said
