"""What the CPU's register tiles reach alone, and how much of it is left in a call.

python -m benchmarks.bench_tiles

Compiles ``tile_rates.cpp``, which runs the tiles of ``csrc/cpu`` without PyTorch: on operands that
stay in the first cache (alone), and on those of one sequence of 32 queries and 32 keys with 512
features. A call is one of 8 such sequences (the workload ``equal``), on one thread. Fastest rounds.
"""

import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import attn_ext

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, FEATURES = 8, 32, 512
TRIPLES = BATCH * LENGTH * LENGTH * FEATURES  # of query, key and feature
CALLS = 300
AVX2 = "-mavx2 -mfma"
AVX512 = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl {AVX2}"
# The flags and the vector's bytes of each instruction set.
ISAS = {"avx512": (AVX512, 64), "avx2": (AVX2, 32)}


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    for isa in torch.ops.attn_ext.cpu_isas().split(", "):
        if isa in ISAS:
            report(isa, tile_rates(isa), *call_times(isa))


def tile_rates(isa: str) -> dict[str, float]:
    """Thousand million triples a second, and multiply-adds under ``peak``."""
    flags, vector_bytes = ISAS[isa]
    definitions = {
        "ATTN_EXT_ISA": isa,
        "ATTN_EXT_ISA_AVX512": int(isa == "avx512"),
        "ATTN_EXT_VECTOR_BYTES": vector_bytes,
    }
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/tile_rates"
        subprocess.run(
            ["c++", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", *flags.split()]
            + [f"-D{name}={value}" for name, value in definitions.items()]
            + [str(Path(__file__).with_name("tile_rates.cpp")), "-o", program],
            check=True,
        )
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name, rate in map(str.split, lines.splitlines())}


def call_times(isa: str) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward."""
    torch.ops.attn_ext.cpu_use_isa(isa)
    torch.manual_seed(0)
    shape = BATCH, LENGTH, FEATURES
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    score_weight = (torch.randn(FEATURES) / FEATURES**0.5).requires_grad_()
    leaves, doutput = (query, key, value, score_weight), torch.randn(shape)

    def forward() -> None:
        with torch.no_grad():
            attn_ext.additive_attention(*leaves)

    def both() -> None:
        torch.autograd.grad(attn_ext.additive_attention(*leaves), leaves, doutput)

    return fastest(forward), fastest(both)


def fastest(call: Callable[[], None]) -> float:
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def report(isa: str, rates: dict[str, float], forward: float, both: float) -> None:
    print(f"\n{isa}: {rates['peak']:.1f} G multiply-adds/s")
    for tile in ("score", "gradient"):
        alone, inside = rates[f"{tile}-alone"], rates[tile]
        share = f"{inside / alone:.0%}"
        print(f"{tile:8s} tile {alone:5.2f} G/s alone, {inside:5.2f} in a sequence: {share}")
    scores, gradients = (TRIPLES / rates[f"{tile}-alone"] * 1e-9 for tile in ("score", "gradient"))
    for name, call, arithmetic in (
        ("forward", forward, scores),
        ("forward + backward", both, scores + gradients),
    ):
        print(
            f"{name}: {call * 1e3:.3f} ms, its tiles alone {arithmetic * 1e3:.3f} ms: "
            f"{call / arithmetic:.2f} times"
        )


if __name__ == "__main__":
    main()
