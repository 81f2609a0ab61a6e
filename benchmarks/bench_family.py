"""Time scores, pooling, features and beams beside what users would write instead.

python -m benchmarks.bench_family [--threads 1] [--rounds 7] [--only scores pooling features beam]

With all cases it writes benchmarks/results/family_*.json.

Calls take turns in one process; of each its median, and of each rival the median ratio to ours.
Results are compared before any time is taken. The peak is what a call holds at most beyond what was
held before, its gradients included. float32, on the CPU.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import attn_ext

from . import harness
from .bench_additive_attention import RESULTS, machine
from .workloads import mixture


class Case(NamedTuple):
    """What is timed: calls by name, ours first, with the leaves to differentiate by."""

    title: str
    calls: dict[str, tuple[Callable[..., Tensor], list[Tensor]]]


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).requires_grad_()


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def padded(rows: Tensor, lengths: list[int]) -> Tensor:
    """Jagged rows as leaves (B, T, features)."""
    return torch.nn.utils.rnn.pad_sequence(
        rows.detach().split(lengths), batch_first=True
    ).requires_grad_()


def scores() -> Case:
    """Scores of sentences as GNMT's, drawn without regard to their length."""
    lengths_q, lengths_k = (list(mixture(64, seed)) for seed in (0, 1))
    dim = 1024
    query, key = leaf(sum(lengths_q), dim), leaf(sum(lengths_k), dim)
    weight = leaf(dim, scale=dim**-0.5)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    bounds = max(lengths_q), max(lengths_k)
    queries, keys = padded(query, lengths_q), padded(key, lengths_k)
    present = [
        torch.arange(n) < torch.tensor(t)[:, None] for n, t in zip(bounds, (lengths_q, lengths_k))
    ]
    absent = ~(present[0].unsqueeze(2) & present[1].unsqueeze(1))

    def ours() -> Tensor:
        result = attn_ext.additive_scores(
            query, key, weight, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            max_seqlen_q=bounds[0], max_seqlen_k=bounds[1],
        )  # fmt: skip
        return result.masked_fill(absent, 0)

    @torch.compile
    def compiled() -> Tensor:
        hidden = torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1))
        return (hidden * weight).sum(-1).masked_fill(absent, 0)

    title = "additive_scores, GNMT mixture unbucketed, B 64, D 1024"
    rivals = {"torch.compile, padded": (compiled, [queries, keys, weight])}
    return Case(title, {"ours": (ours, [query, key, weight]), **rivals})


def pooling() -> Case:
    """Gated pooling of ragged bags."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(500, 20001, (8,), generator=generator).tolist()
    total, dim, value_dim = sum(lengths), 256, 512
    key, gate, value = leaf(total, dim), leaf(total, dim), leaf(total, value_dim)
    weight = leaf(dim, scale=dim**-0.5)
    cu, longest = offsets(lengths), max(lengths)
    absent = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    by_bag = [padded(rows, lengths) for rows in (key, gate, value)]

    def ours() -> Tensor:
        return attn_ext.additive_pool(
            key, value, weight, gate=gate, cu_seqlens_k=cu, max_seqlen_k=longest
        )

    def loop() -> Tensor:
        bags = []
        for k, g, v in zip(*(rows.split(lengths) for rows in (key, gate, value))):
            bags.append(((torch.tanh(k) * torch.sigmoid(g)) @ weight).softmax(0) @ v)
        return torch.stack(bags)

    @torch.compile
    def compiled() -> Tensor:
        k, g, v = by_bag
        hidden = torch.tanh(k) * torch.sigmoid(g)
        weights = (hidden * weight).sum(-1).masked_fill(absent, -torch.inf).softmax(-1)
        return torch.bmm(weights.unsqueeze(1), v).squeeze(1)

    ragged = [key, gate, value, weight]
    calls = {
        "ours": (ours, ragged),
        "eager, bag by bag": (loop, ragged),
        "torch.compile, padded": (compiled, [*by_bag, weight]),
    }
    return Case(f"gated additive_pool, 8 bags of 500 to 20,000 ({total:,}), D 256, Dv 512", calls)


def features() -> Case:
    """Location features of 100 steps, through a memory."""
    batch, length, dim, value_dim, count, steps = 16, 150, 128, 512, 32, 100
    key, value = leaf(batch, length, dim), leaf(batch, length, value_dim)
    weight, feature_weight = leaf(dim, scale=dim**-0.5), leaf(count, dim, scale=count**-0.5)
    queries = [leaf(batch, dim) for _ in range(steps)]
    terms = [leaf(batch, length, count) for _ in range(steps)]

    def ours() -> Tensor:
        memory = attn_ext.AttentionMemory(key, value, weight, feature_weight=feature_weight)
        return torch.stack([memory.attend(q, features=f) for q, f in zip(queries, terms)])

    def eager() -> Tensor:
        contexts = []
        for query, term in zip(queries, terms):
            hidden = torch.tanh(query.unsqueeze(1) + key + term @ feature_weight)
            weights = (hidden @ weight).softmax(-1)
            contexts.append(torch.bmm(weights.unsqueeze(1), value).squeeze(1))
        return torch.stack(contexts)

    leaves = [key, value, weight, feature_weight, *queries, *terms]
    title = "100 steps with location features, B 16, Tk 150, D 128, Dv 512, F 32"
    return Case(title, {"ours": (ours, leaves), "eager": (eager, leaves)})


def beam() -> Case:
    """A beam of 5 over 30 steps: queries that share keys, or keys repeated for each of them."""
    width, steps, dim = 5, 30, 512
    lengths = list(mixture(32, 0))
    key, value = leaf(sum(lengths), dim), leaf(sum(lengths), dim)
    weight, cu, longest = leaf(dim, scale=dim**-0.5), offsets(lengths), max(lengths)
    queries = [leaf(len(lengths), width, dim) for _ in range(steps)]

    def ours() -> Tensor:
        memory = attn_ext.AttentionMemory(key, value, weight, cu_seqlens_k=cu, max_seqlen_k=longest)
        return torch.stack([memory.attend(query) for query in queries])

    def repeated() -> Tensor:
        keys, values = (
            torch.cat([row for row in rows.split(lengths) for _ in range(width)])
            for rows in (key, value)
        )
        each = offsets([length for length in lengths for _ in range(width)])
        contexts = [
            attn_ext.additive_attention(
                query.flatten(0, 1), keys, values, weight, cu_seqlens_k=each, max_seqlen_k=longest
            )
            for query in queries
        ]
        return torch.stack(contexts).unflatten(1, (-1, width))

    leaves = [key, value, weight, *queries]
    calls = {"ours": (ours, leaves), "additive_attention, keys repeated": (repeated, leaves)}
    return Case("a beam of 5 over 30 steps, B 32, GNMT mixture, D 512", calls)


CASES = {"scores": scores, "pooling": pooling, "features": features, "beam": beam}


def seconds(call: Callable[..., Tensor], leaves: list[Tensor], mode: str) -> float:
    start = time.perf_counter()
    if mode == "forward":
        with torch.no_grad():
            call()
    else:
        output = call()
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    return time.perf_counter() - start


def measure(case: Case, rounds: int) -> list[dict]:
    results = {name: call().detach() for name, (call, _) in case.calls.items()}
    for result in results.values():
        torch.testing.assert_close(result, results["ours"], rtol=1e-4, atol=1e-4)
    rows = []
    for mode in ("forward", "forward + backward"):
        taken: dict[str, list[float]] = {name: [] for name in case.calls}
        for turn in range(rounds + 1):
            for name, (call, leaves) in case.calls.items():
                elapsed = seconds(call, leaves, mode)
                if turn:  # the first compiles
                    taken[name].append(elapsed)
        for name, times in taken.items():
            ratio = statistics.median(t / own for t, own in zip(times, taken["ours"]))
            milliseconds = 1e3 * statistics.median(times)
            call, leaves = case.calls[name]
            peak = harness.peak_of(functools.partial(seconds, call, leaves, mode), "cpu") / 2**20
            row = {"case": case.title, "mode": mode, "call": name}
            rows.append(row | {"ms": milliseconds, "ratio": ratio, "peak_mib": peak})
            line = f"{mode:19} {name:34} {milliseconds:9.1f} ms {ratio:7.2f} {peak:9.1f} MiB"
            print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine("cpu")
    print(f"{about['name']}, torch {torch.__version__}, {options.threads} threads, {date.today()}")
    rows = []
    for name in options.only:
        torch.manual_seed(0)
        case = CASES[name]()
        print(f"\n{case.title}")
        rows += measure(case, options.rounds)
    if len(options.only) < len(CASES):
        return
    report = {"machine": about, "date": str(date.today()), "torch": torch.__version__}
    report |= {"threads": options.threads, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"family_{about['slug']}_{torch.ops.attn_ext.cpu_isa()}_{options.threads}.json"
    path = options.out / name
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
