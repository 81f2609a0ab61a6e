"""Host time of one call on tiny CPU tensors, beside scaled_dot_product_attention, and its parts.

python -m benchmarks.bench_overhead

The kernels have next to nothing to do here: what is left is Python, the dispatcher and autograd.
Calls take turns in short rounds; of each the median round, the fastest, and the ratio of medians.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attn_ext
from attn_ext import autograd, layout, ops

BATCH, LENGTH, FEATURES = 2, 3, 8
ROUNDS, CALLS = 200, 20
Call = Callable[[], object]


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {BATCH} sequences of {LENGTH}, D {FEATURES}, 1 thread, us")
    calls = layouts()
    report("forward", calls, "sdpa")
    report("forward and backward", {name: both(call) for name, call in calls.items()}, "sdpa")
    report("parts of a padded forward", parts(), None)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def layouts() -> dict[str, Call]:
    """A call of every kind, all with gradients recorded."""
    attend = attn_ext.additive_attention
    query, key, value = (leaf(BATCH, LENGTH, FEATURES) for _ in range(3))
    score_weight, step = leaf(FEATURES), leaf(BATCH, FEATURES)
    heads = [leaf(BATCH, LENGTH, 1, FEATURES) for _ in range(3)]
    rows = [leaf(BATCH * LENGTH, FEATURES) for _ in range(3)]
    offsets = torch.arange(BATCH + 1) * LENGTH
    lengths = torch.full((BATCH,), LENGTH)
    module = attn_ext.AdditiveAttention(FEATURES, FEATURES, FEATURES)
    memory = attn_ext.AttentionMemory(key.detach(), value.detach(), score_weight.detach())
    four = [tensor.detach().unsqueeze(1).requires_grad_() for tensor in (query, key, value)]
    return {
        "sdpa": lambda: scaled_dot_product_attention(query, key, value),
        "sdpa, 4 axes": lambda: scaled_dot_product_attention(*four),
        "padded": lambda: attend(query, key, value, score_weight),
        "padded, lengths": lambda: attend(query, key, value, score_weight, key_lengths=lengths),
        "heads": lambda: attend(*heads, score_weight.unsqueeze(0)),
        "one step": lambda: attend(step, key, value, score_weight),
        "jagged": lambda: attend(*rows, score_weight, cu_seqlens_q=offsets, cu_seqlens_k=offsets),
        "jagged, one step": lambda: attend(step, *rows[1:], score_weight, cu_seqlens_k=offsets),
        "weights": lambda: attend(query, key, value, score_weight, need_weights=True)[0],
        "memory, a step": lambda: memory.attend(step),
        "module": lambda: module(query, key),
    }


def both(call: Call) -> Call:
    gradient = torch.ones_like(call())
    return lambda: call().backward(gradient)


def parts() -> dict[str, Call]:
    """What the forward call of padded tensors does, a part at a time."""
    query, key, value = (leaf(BATCH, LENGTH, FEATURES) for _ in range(3))
    score_weight = leaf(FEATURES)
    keys = layout.check_key_side(key, value, score_weight, None, None, None, None)
    queries = layout.check_query_side(query, keys)
    arguments = {
        **queries._asdict(),
        **keys._asdict(),
        "dropout_p": 0.0,
        "dropout_seed": None,
        "weights_layout": 0,
        "keep_scores": False,
        "deterministic": False,
        "backend": "cpu",
    }
    positional = [arguments[name] for name in ops.argument_names(ops.forward)]
    context = autograd.forward(**arguments)[0]

    def unrecorded() -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.forward(*positional)

    def checks() -> object:
        keys = layout.check_key_side(key, value, score_weight, None, None, None, None)
        return layout.check_query_side(query, keys)

    return {
        "all": lambda: attn_ext.additive_attention(query, key, value, score_weight),
        "checks and views": checks,
        "views alone": lambda: (
            query.unsqueeze(2),
            key.unsqueeze(2),
            value.unsqueeze(2),
            score_weight.unsqueeze(0),
        ),
        "op and its autograd": lambda: autograd.forward(**arguments),
        "op alone": unrecorded,
        "view of the context": lambda: context.squeeze(2),
    }


def report(title: str, calls: dict[str, Call], yardstick: str | None) -> None:
    times = measure(calls)
    print(f"\n{title:26s} {'median':>8s} {'fastest':>8s}" + "   of sdpa" * (yardstick is not None))
    for name, rounds in times.items():
        line = f"{name:26s} {statistics.median(rounds):8.1f} {min(rounds):8.1f}"
        if yardstick is not None:
            ratio = statistics.median(rounds) / statistics.median(times[yardstick])
            line += f"   {ratio:6.2f}x"
        print(line)


def measure(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds a call, of every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return times


if __name__ == "__main__":
    main()
