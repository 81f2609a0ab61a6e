"""What the workloads of a GPU should take, from what their kernels issue when executed.

    python -m benchmarks.predict [--sample 16]

Not measured: of calls with several queries a sequence every kernel of every launch is executed as
compiled for sm_90 (:mod:`benchmarks.dynamic`), and takes as long as the slowest of three: its
blocks' issue slots, dealt to multiprocessors; its special functions, 16 a clock and multiprocessor;
its sectors of global memory at the bandwidth of a copy. Latency of memory, barriers and the
launches themselves are left out, of torch.compile all but the tanh of its forward pass. Of one
query a sequence it is the bytes alone. It is to be held against what
``benchmarks.bench_additive_attention --device cuda`` measures.
"""

import argparse
from dataclasses import replace

from . import dynamic, static, tanh_yardstick
from .floors import OPERATIONS_A_CLOCK, floor
from .workloads import WORKLOADS, Workload

LANES = 128  # that a multiprocessor issues for in a clock
BYTES_A_SECOND = 3.0e12  # read + written, of a copy on an H100
TABLE = ("at-once", "gnmt-384", "step", "one-long-512", "skewed-512")
DECODER = "step-decoder"
CLOCKS = dynamic.PROCESSORS * dynamic.CLOCK_GHZ * 1e9  # of all multiprocessors in a second


def seconds(launch: dynamic.Launch, repeats: int) -> float:
    """Of a launch of a batch in which each sequence of the sample comes so many times."""
    issued = dynamic.makespan(dynamic.batch_blocks(launch, repeats), launch.resident)
    computed = repeats * 32 * launch.special_functions / (OPERATIONS_A_CLOCK * CLOCKS)
    moved = repeats * 32 * launch.sectors / BYTES_A_SECOND
    return max(issued / (dynamic.CLOCK_GHZ * 1e9), computed, moved)


def executed(workload: Workload, sample: int) -> dict[str, float]:
    """Seconds of forward and of backward of a batch that a sample of its sequences stands for."""
    lengths = workload.query_lengths, workload.key_lengths
    alike = len(set(zip(*lengths, strict=True))) == 1
    pairs = dynamic.sampled(*lengths, 1 if alike else sample)
    most = max(map(max, lengths))
    repeats = len(workload.key_lengths) // len(pairs)
    modes = dynamic.run("triton", *zip(*pairs), most, workload.dim, "sm_90", repeats)
    found = [sum(seconds(launch, repeats) for launch in launches) for launches in modes]
    return dict(zip(("forward", "backward"), found, strict=True))


def tanh_seconds(workload: Workload) -> float:
    """Of the accurate tanh of every triple (i, j, d), each sequence as long as the longest."""
    (case,) = tanh_yardstick.static_cases()
    slots = static.figures_of(case, "sm_90").element.slots
    longest = max(workload.query_lengths) * max(workload.key_lengths)
    return slots * len(workload.key_lengths) * longest * workload.dim / (LANES * CLOCKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=16, help="sequences that stand for a mixture")
    options = parser.parse_args()
    peaks = {
        "copied_bytes_per_second": BYTES_A_SECOND,
        "special_functions_per_second": OPERATIONS_A_CLOCK * CLOCKS,
    }
    print(
        f"{dynamic.PROCESSORS} multiprocessors, {dynamic.CLOCK_GHZ} GHz, "
        f"{BYTES_A_SECOND / 1e12} TB/s, bfloat16"
    )
    for workload in (WORKLOADS[name] for name in TABLE):
        predicted = {} if workload.one_query else executed(workload, options.sample)
        for mode in ("forward", "backward"):
            bound = floor(workload, mode, 2, peaks)
            text = f"{workload.name} {mode}: floor {bound.seconds * 1e3:.3f} ms ({bound.bound_by})"
            if mode in predicted:
                text += f", predicted {predicted[mode] * 1e3:.3f} ms"
            if predicted and mode == "forward":
                rival = tanh_seconds(workload)
                text += (
                    f", torch.compile's tanh {rival * 1e3:.3f} ms: "
                    f"{rival / predicted[mode]:.1f} times as long"
                )
            print(text, flush=True)
    loop = WORKLOADS[DECODER]
    step = replace(loop, steps=0, query_lengths=(1,) * len(loop.key_lengths))
    for mode in ("forward", "backward"):
        steps = loop.steps * floor(step, mode, 2, peaks).seconds
        print(f"{loop.name} {mode}: floor of {loop.steps} steps {steps * 1e3:.3f} ms (memory)")


if __name__ == "__main__":
    main()
