"""Time the attentions that attn_ext.compat replaces, before and after.

python -m benchmarks.bench_compat [--threads 1] [--rounds 9] [--only CLAMAttnNet ...]

With all cases it writes benchmarks/results/compat_*.json.

The modules are those of the packages (in .venv/peers, where `make test` installs them), and of
those that are on no index a rewrite. Both take turns in one process; printed are the largest
differences of results and of gradients, as parts of the largest result and gradient, medians of the
time that a step of a decoder or a call takes, and the memory that a call with its backward pass
takes. float32, on the CPU.
"""

import argparse
import copy
import functools
import importlib.metadata
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attn_ext import compat
from attn_ext.compat.replacement import Replacement

from .bench_additive_attention import RESULTS, machine
from .compat_cases import CASES as CASES_OF_PICTURES
from .compat_cases import Case
from .compat_speech_cases import SPEECH_CASES
from .harness import peak_of

CASES = (*CASES_OF_PICTURES, *SPEECH_CASES.items())


def run(case: Case, module: nn.Module, mode: str) -> tuple[float, list[Tensor]]:
    """Seconds a step; the result and, with a backward pass, all gradients."""
    start = time.perf_counter()
    with torch.set_grad_enabled(mode != "forward"):
        results = [case.call(module)]
    if mode != "forward":
        wanted = [*case.leaves, *module.parameters()]
        # A gradient of 0 may be none: MONAI's model has layers that are not asked for here.
        results += torch.autograd.grad(results[0].square().sum(), wanted, materialize_grads=True)
    return (time.perf_counter() - start) / case.steps, [result.detach() for result in results]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, as a part of the largest value."""
    largest = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return largest / max(tensor.abs().max().item() for tensor in theirs)


def measure(kind: type[Replacement], case: Case, rounds: int) -> dict[str, object]:
    model = nn.ModuleDict({"model": case.theirs})
    replaced = copy.deepcopy(model)
    if not compat.replace_attention(replaced):
        raise AssertionError(f"{kind.__name__}: nothing was replaced")
    modules = {"before": model["model"], "after": replaced["model"]}
    try:
        version = importlib.metadata.version(kind.package)
    except importlib.metadata.PackageNotFoundError:
        version = "rewritten"
    row: dict[str, object] = {"kind": kind.__name__, "version": version, "case": case.title}
    (_, theirs), (_, ours) = (run(case, m, "forward + backward") for m in modules.values())
    row["output"] = difference(ours[:1], theirs[:1])
    row["gradients"] = difference(ours[1:], theirs[1:])
    if max(row["output"], row["gradients"]) > 1e-3:
        raise AssertionError(f"{kind.__name__}: results differ: {row}")
    for mode in ("forward", "forward + backward"):
        taken: dict[str, list[float]] = {name: [] for name in modules}
        for turn in range(rounds + 1):
            for name, module in modules.items():
                seconds, _ = run(case, module, mode)
                if turn:  # the first may allocate
                    taken[name].append(1e3 * seconds)
        row[mode] = {name: statistics.median(times) for name, times in taken.items()}
        row[mode]["ratio"] = statistics.median(map(float.__truediv__, *taken.values()))
    row["peak_mib"] = {
        name: peak_of(functools.partial(run, case, module, "forward + backward"), "cpu") / 2**20
        for name, module in modules.items()
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted({kind.__name__ for kind, _ in CASES})
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine("cpu")
    print(f"{about['name']}, torch {torch.__version__}, {options.threads} threads, {date.today()}")
    titles = "class", "version", "case", "Δ output", "Δ gradients"
    print(f"\n| {' | '.join((*titles, 'forward ms', 'with backward ms', 'peak MiB'))} |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for kind, make in CASES:
        if kind.__name__ not in options.only:
            continue
        torch.manual_seed(0)
        try:
            case = make(kind)
        except pytest.skip.Exception as missing:
            print(f"{kind.__name__}: {missing}", file=sys.stderr)
            continue
        row = measure(kind, case, options.rounds)
        rows.append(row)
        times = (
            f"{row[mode]['before']:.3g} → {row[mode]['after']:.3g} ({row[mode]['ratio']:.1f}x)"
            for mode in ("forward", "forward + backward")
        )
        cells = row["version"], row["case"], f"{row['output']:.0e}", f"{row['gradients']:.0e}"
        peaks = f"{row['peak_mib']['before']:.0f} → {row['peak_mib']['after']:.0f}"
        print(f"| `{kind.__name__}` | {' | '.join((*cells, *times, peaks))} |", flush=True)
    if len(rows) < len(CASES):
        return
    report = {"machine": about, "threads": options.threads, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"compat_{about['slug']}_{options.threads}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
