"""What the workloads of a GPU should take, from the kernels' machine code and their tiles.

    python -m benchmarks.predict [--processors 132 --clock 1.755 --bandwidth 3.0]

Not measured: the main loops of Triton's kernels for sm_90 at one issue slot a clock and
scheduler, with whole tiles counted where sequences fill them in part; and bytes at the bandwidth of
a copy, whichever takes longer. Latency of memory, barriers and launches are left out, of
torch.compile all but the tanh of its forward pass. It is to be held against what
``benchmarks.bench_additive_attention --device cuda`` measures.
"""

import argparse
from dataclasses import replace

import torch

from attn_ext.triton_kernels import configurations, gradient, scores

from . import static, static_cases, tanh_yardstick
from .floors import floor
from .sass import Counts, disassemble, per_element
from .workloads import WORKLOADS, Workload

LANES = 128  # that a multiprocessor issues for in a clock
TABLE = ("at-once", "gnmt-384", "step", "one-long-512", "skewed-512")
DECODER = "step-decoder"
TILE = configurations.SCORES.queries, configurations.SCORES.keys
GROUP = scores.GROUP.value  # rows that a score tile has more or less of
PAIRED = 3.5  # issue slots an element of what a score tile leaves out for absent rows
ROWS = gradient.TILE_ROWS.value  # keys that the gradient pass takes at least


def tile_slots(launch: tuple, regime: str) -> list[float]:
    """Issue slots an element of a kernel's paired loops.

    Those over as many elements each come in the order of what their tiles share: exponentials, the
    more the larger the tile is.
    """
    case = static_cases.make_case(launch, regime, "", "bf16", 1024)
    compiled = static.compile_case(case, "sm_90")
    kernel = disassemble(compiled.asm["cubin"])[compiled.metadata.name]
    elements = case.elements_per_iteration / case.num_warps
    found = []
    for loop in kernel.loops:
        if any(other.parent is loop for other in kernel.loops):
            continue
        element = per_element(Counts.of(loop.straight(lambda block: False)), elements)
        if element.reciprocals and element.mufu / element.reciprocals <= 1.5:
            found.append(element)
    return [e.slots for e in sorted(found, key=lambda e: e.mufu)]


def parts(length: int, size: int) -> list[int]:
    """The rows of each tile of a side, in whole groups."""
    whole, rest = divmod(length, size)
    return [size] * whole + ([-(-rest // GROUP) * GROUP] if rest else [])


def score_slots(workload: Workload, slots: float) -> float:
    """Issue slots of all scores; ``slots``: an element of a whole tile."""
    total = 0.0
    for queries, keys in zip(workload.query_lengths, workload.key_lengths, strict=True):
        for tile_q in parts(queries, TILE[0]):
            for tile_k in parts(keys, TILE[1]):
                whole = TILE[0] * TILE[1]
                total += whole * slots - (whole - tile_q * tile_k) * PAIRED
    return total * workload.dim


def gradient_slots(workload: Workload, slots: float) -> float:
    """Issue slots of the pass over all pairs that gives the gradients."""
    lengths = zip(workload.query_lengths, workload.key_lengths, strict=True)
    return sum(queries * -(-keys // ROWS) * ROWS for queries, keys in lengths) * (
        slots * workload.dim
    )


def tanh_slots() -> float:
    """Issue slots an element of the loop that evaluates the accurate tanh of every triple."""
    (case,) = tanh_yardstick.static_cases()
    return static.figures_of(case, "sm_90").element.slots


def padded_elements(workload: Workload) -> int:
    """Triples (i, j, d) where each sequence is as long as the longest."""
    batch = len(workload.key_lengths)
    return batch * max(workload.query_lengths) * max(workload.key_lengths) * workload.dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors (H100: 132)")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s read + written")
    options = parser.parse_args()
    forward, backward, _ = static_cases.launches_of(torch.bfloat16, 1024, 75, 75)
    launches = {launch[0].__name__: launch for launch in forward + backward}

    forwards = tile_slots(launches["additive_attention_fwd_kernel"], "all")
    gradients = tile_slots(launches["additive_attention_grad_kernel"], "all")
    tanh = tanh_slots()
    tiles = {"forward": forwards, "gradients": gradients, "tanh": [tanh]}
    for name, found in tiles.items():
        print(f"{name}: slots an element by tile:", ", ".join(f"{n:.2f}" for n in found))
    clocks = options.processors * options.clock * 1e9
    peaks = {
        "copied_bytes_per_second": options.bandwidth * 1e12,
        "special_functions_per_second": 16 * clocks,
    }
    print(f"{options.processors} multiprocessors, {options.clock} GHz, {options.bandwidth} TB/s")
    for workload in (WORKLOADS[name] for name in TABLE):
        for mode in ("forward", "backward"):
            bound = floor(workload, mode, 2, peaks)
            text = f"{workload.name} {mode}: floor {bound.seconds * 1e3:.3f} ms ({bound.bound_by})"
            if not workload.one_query:
                if mode == "forward":
                    issued = score_slots(workload, min(forwards))
                else:
                    issued = gradient_slots(workload, min(gradients))
                text += f", predicted {issued / (LANES * clocks) * 1e3:.3f} ms"
                if mode == "forward":
                    rival = tanh * padded_elements(workload)
                    text += (
                        f", torch.compile's tanh {rival / (LANES * clocks) * 1e3:.3f} ms: "
                        f"{rival / issued:.1f} times as long"
                    )
            print(text)
    loop = WORKLOADS[DECODER]
    step = replace(loop, steps=0, query_lengths=(1,) * len(loop.key_lengths))
    for mode in ("forward", "backward"):
        seconds = loop.steps * floor(step, mode, 2, peaks).seconds
        print(f"{loop.name} {mode}: floor of {loop.steps} steps {seconds * 1e3:.3f} ms (memory)")


if __name__ == "__main__":
    main()
