"""Run cases on executed PTX: ``python -m tests.ptx triton --target sm_80 --only jagged step``.

A line a case: ok, WRONG (results beyond the budget), FOUND (results right, accesses not) or UNKNOWN
(PTX that the executor does not know); below it kernels with their blocks, and the findings. The
exit status is 1 unless all are ok.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the suite's helpers
os.environ["TRITON_INTERPRET"] = "0"  # compiled, not interpreted

DTYPES = ("float32", "bfloat16", "float16")
TARGETS = ("sm_75", "sm_80", "sm_90")  # the first only of CUDA C++


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("backend", choices=("triton", "cuda"))
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=["sm_90"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=DTYPES[:2])
    parser.add_argument("--only", nargs="*", metavar="CASE", help="all are run by default")
    parser.add_argument("--but", nargs="*", default=(), metavar="CASE", help="not these")
    noise = "approximate instructions err by up to their documented error"
    parser.add_argument("--noise", action="store_true", help=noise)
    order = "run blocks, and the warps of a block, one after the other in an order of this seed"
    parser.add_argument("--order", type=int, help=order)
    few = "triton: of the GPU that launchers plan for; few: a program does the work of several"
    parser.add_argument("--processors", type=int, default=132, help=few)
    waves = "cuda: room for few queries at a time"
    parser.add_argument("--small-waves", action="store_true", help=waves)
    mutate = "take out barriers and waits of this kernel, at most so many, and see what is noticed"
    parser.add_argument("--mutate", nargs=2, metavar=("KERNEL", "MOST"), help=mutate)
    return parser.parse_args()


def run(case, session, execution, backend: str, dtype) -> tuple[str, list[str]]:
    """The verdict, and what is to be said of it."""
    from .machine import Deadlock
    from .parser import Unsupported

    session.report.clear()
    session.forget()
    first = len(session.launches)
    try:
        with execution(session):
            case.run(backend, dtype)
        verdict, said = "ok", []
    except (AssertionError, Deadlock) as problem:
        verdict, said = "WRONG", [str(problem)]
    except Unsupported as problem:
        verdict, said = "UNKNOWN", [f"not understood: {problem}"]
    # Triton notes its compilation, CUDA C++ its kernel's name.
    launches = session.launches[first:]
    kernels = (f"{getattr(c, 'name', c)}x{g[0] * g[1] * g[2]}" for c, g, *_ in launches)
    said += session.report.lines()
    if verdict == "ok" and session.report.found:
        verdict = "FOUND"
    return verdict, [" ".join(kernels), *said]


def main() -> None:
    arguments = parsed_arguments()
    if arguments.backend == "cuda":
        from . import run_cuda

        if problem := run_cuda.missing():
            sys.exit(f"python -m tests.ptx: {problem}")
        run_cuda.preload(["-m", "tests.ptx", *sys.argv[1:]])
    import torch

    from .cases import CASES

    options = {"noise": arguments.noise, "order": arguments.order}
    names = [n for n in arguments.only or CASES if n not in arguments.but]
    bad = total = 0
    for target in arguments.target:
        if arguments.backend == "cuda":
            definitions = (run_cuda.SMALL_WAVES,) if arguments.small_waves else ()
            session = run_cuda.CudaSession(int(target[3:]), definitions, **options)
            execution = run_cuda.cuda_execution
        else:
            from . import run_triton

            session = run_triton.TritonSession(target, arguments.processors, **options)
            execution = run_triton.triton_execution
        for dtype in arguments.dtype:
            for name in names:
                begin = time.monotonic()
                run_this = CASES[name], session, execution, arguments.backend
                if arguments.mutate:
                    from .mutate import mutate

                    kernel, most = arguments.mutate
                    verdict, said = mutate(run, run_this, getattr(torch, dtype), kernel, int(most))
                else:
                    verdict, said = run(*run_this, getattr(torch, dtype))
                seconds = time.monotonic() - begin
                more = [f"{k}={v}" for k, v in options.items() if v not in (None, False)]
                what = " ".join([arguments.backend, target, dtype, name, *more])
                print(f"{verdict} {what} ({seconds:.1f} s)", *said, sep="\n    ", flush=True)
                bad, total = bad + (verdict != "ok"), total + 1
    print(f"{total - bad} of {total} ok")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
