"""Host time of one call on tiny CPU tensors, beside scaled_dot_product_attention, and its parts.

python -m benchmarks.bench_overhead

The kernels have next to nothing to do here: what is left is Python, the dispatcher and autograd.
Calls take turns in short rounds; of each the median round, the fastest, and the ratio of medians.

Of the Triton backend, without a GPU: its launchers with kernels that do nothing, and again with
what Triton itself does for a launch (it looks up the compiled kernel) up to the driver's call.
"""

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

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
    if importlib.util.find_spec("triton") is not None:
        for looks_up in (False, True):
            with idle_kernels(looks_up):
                name = "launchers, with Triton's own part" if looks_up else "launchers of Triton"
                report(name, launchers(), None)


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


@contextlib.contextmanager
def idle_kernels(looks_up: bool) -> Iterator[None]:
    """Kernels do nothing; ``looks_up``: but find what would be launched, as on an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from benchmarks.static_cases import MODULES

    def do_nothing(*_, **__) -> None:
        pass

    class Kernel:
        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            return do_nothing

    compiled = mock.Mock(function=0, packed_metadata=(), spec=["function", "run"])
    compiled.launch_metadata = compiled.run = do_nothing

    def compile_nothing(self, key, signature, device, *_) -> object:
        self.device_caches[device][0][key] = compiled
        return compiled

    gpu = mock.Mock(spec=[])
    gpu.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    gpu.get_current_device = lambda: 0
    gpu.get_current_stream = lambda device: 0
    with contextlib.ExitStack() as stack:
        if looks_up:
            stack.enter_context(mock.patch.object(driver, "_active", gpu))
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_nothing))
        for module in () if looks_up else MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Kernel()))
        yield


def launchers() -> dict[str, Call]:
    """Of jagged tensors in the internal form, with a gradient for every input."""
    from attn_ext.triton_kernels import launch

    rows, cu = torch.randn(1, BATCH * LENGTH, 1, FEATURES), torch.arange(BATCH + 1) * LENGTH
    step, steps = rows[0, :BATCH, None], torch.randn(LENGTH, BATCH, 1, FEATURES)
    score_weight, branch = torch.randn(1, FEATURES), torch.randn(1, 1, FEATURES)
    pairs = torch.empty(1, BATCH * LENGTH, 1, LENGTH)
    by_key, by_step = pairs[..., 0].contiguous(), torch.empty(LENGTH, 1, BATCH * LENGTH, 1)
    stats, step_stats = torch.empty(*rows.shape[:3], 2), torch.empty(BATCH, 1, 1, 2)
    keys, key_layout = (rows, rows, score_weight), (cu, None, None, LENGTH)
    no_dropout, all_at_once = (0.0, None, 0), (cu, cu, None, None, LENGTH, LENGTH)
    one_query = (None, cu, None, None, 1, LENGTH)

    forward, backward = launch.additive_attention_forward, launch.additive_attention_backward
    given, step_given = (rows, None, rows, *keys), (step, None, step, *keys)
    options = *all_at_once, *no_dropout
    step_options = *one_query, *no_dropout
    pooled, pool_options = (rows, rows, branch, rows), (*key_layout, 0.0, 0.0, *no_dropout)
    return {
        "forward": lambda: forward(rows, *keys, None, None, *options, True, False),
        "backward": lambda: backward(*given, stats, pairs, *options, 15, False),
        "step, forward": lambda: forward(step, *keys, None, None, *step_options, True, False),
        "step, backward": lambda: backward(
            *step_given, step_stats, by_key, *step_options, 15, False
        ),
        "memory, a step's backward": lambda: launch.additive_attention_step_backward(
            *step_given, None, None, step_stats, by_key, *key_layout, *no_dropout, 1, False
        ),
        "memory, backward": lambda: launch.additive_attention_memory_backward(
            steps, by_step, by_step, steps, *keys, None, None, *key_layout, 14, False
        ),
        "pooling, forward": lambda: launch.additive_pool_forward(
            *pooled, *pool_options, True, False
        ),
        "pooling, backward": lambda: launch.additive_pool_backward(
            step, None, *pooled, step_stats, by_key[..., None], *pool_options, 30, False
        ),
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
