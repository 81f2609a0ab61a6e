"""What a bug report needs: ``python -m attn_ext``.

Prints versions, the backends and why one is missing, one check of each that is there, and one
timing beside plain PyTorch. The exit status is 1 if a check failed.
"""

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import attn_ext

from . import backends

BATCH, LENGTH, FEATURES = 8, 32, 512
NAMES = ("query", "key", "value", "score_weight")
ROUNDS = 7


def make_inputs() -> tuple[list[Tensor], Tensor]:
    """Query, key, value and score weight, the same in every run, and the padding of the keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, LENGTH, FEATURES)] * 3 + [(FEATURES,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3] *= FEATURES**-0.5
    lengths = torch.randint(1, LENGTH + 1, (BATCH,), generator=generator)
    return tensors, torch.arange(LENGTH) >= lengths.unsqueeze(1)


def run(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The context and the gradients of its sum of squares."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    context = attend(*leaves)
    return [context.detach(), *torch.autograd.grad(context.square().sum(), leaves)]


def by_hand(ignored: Tensor) -> Callable[..., Tensor]:
    """What one writes without this package: it stores ``(B, Tq, Tk, D)`` for the backward pass."""

    def attend(*tensors: Tensor) -> Tensor:
        query, key, value, score_weight = tensors
        scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ score_weight
        return scores.masked_fill(ignored.unsqueeze(1), -torch.inf).softmax(-1) @ value

    return attend


def on_backend(backend: str, ignored: Tensor) -> Callable[..., Tensor]:
    def attend(*tensors: Tensor) -> Tensor:
        query, key, value, score_weight = tensors
        return attn_ext.additive_attention(
            query, key, value, score_weight, key_padding_mask=ignored, backend=backend
        )

    return attend


def check(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend keeps to the error budget, against the formula in float64."""
    tensors, ignored = make_inputs()
    exact = run(by_hand(ignored), [tensor.double() for tensor in tensors])
    plain = run(by_hand(ignored), tensors)
    try:
        there = [tensor.to(device) for tensor in tensors]
        ours = [r.cpu() for r in run(on_backend(backend, ignored.to(device)), there)]
    except Exception as problem:
        return False, f"FAILED: {type(problem).__name__}: {problem}"
    lines, kept = [], True
    for name, right, eager, result in zip(("context", *NAMES), exact, plain, ours):
        scale = float(right.abs().max())
        error, allowed = (float((r - right).abs().max()) / scale for r in (result, eager))
        # The budget that the tests have: 2 times eager's error, of gradients 3 times, and 1e-6.
        allowed = (2 if name == "context" else 3) * allowed + 1e-6
        good = error <= allowed  # false of NaN
        kept &= good
        title = name if name == "context" else f"d{name}"
        lines.append(f"{title} {error:.0e}{'' if good else f' > {allowed:.0e} allowed'}")
    return kept, f"{'ok' if kept else 'FAILED'}, largest error / scale: {', '.join(lines)}"


def timing(backend: str, device: torch.device) -> str:
    """The shortest of some rounds, the op and plain PyTorch in turn.

    With one thread: where others use the cores, too, several would wait for each other.
    """
    tensors, ignored = make_inputs()
    tensors, ignored = [tensor.to(device) for tensor in tensors], ignored.to(device)
    calls = on_backend(backend, ignored), by_hand(ignored)
    best = [float("inf")] * 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(ROUNDS):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            run(call, tensors)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[number] = min(best[number], time.perf_counter() - start)
    torch.set_num_threads(threads)
    ours, plain = best
    return (
        f"{1e3 * ours:.2f} ms ({backend}), plain PyTorch {1e3 * plain:.2f} ms, "
        f"{plain / ours:.1f} times as long; {BATCH} sequences of up to {LENGTH}, "
        f"{LENGTH} queries each, {FEATURES} features, forward and backward, one thread"
    )


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def find_backends() -> tuple[dict[str, torch.device], dict[str, str]]:
    """The backends that are there, each with its device, and why the others are not."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    has_gpu = torch.cuda.is_available()
    there, missing = {}, {}
    for name in backends.BACKENDS:
        device = gpu if has_gpu and name in ("triton", "cuda") else cpu
        problem = backends.problem(name, device)
        if problem is None:
            there[name] = device
        elif has_gpu or name == "cpu":
            missing[name] = problem
        else:  # what else is missing than a GPU
            missing[name] = backends.problem(name, gpu) or "PyTorch finds no GPU"
    return there, missing


def main() -> int:
    print(f"attn_ext  {attn_ext.__version__} in {Path(attn_ext.__file__).parent}")
    print(f"torch     {version_of('torch')}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    print(f"triton    {version_of('triton')}")
    print(f"python    {platform.python_version()}, {platform.platform()}")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    print(f"GPU       {', '.join(gpus) or 'none that PyTorch finds'}")
    print(f"threads   {torch.get_num_threads()}")
    there, missing = find_backends()
    for name in backends.BACKENDS:
        text = f"missing, {missing[name]}" if name in missing else "available"
        if name == "cpu" and name in there:
            text += f", with {torch.ops.attn_ext.cpu_isa()} (of {torch.ops.attn_ext.cpu_isas()})"
        print(f"backend   {name}: {text}")
    good = True
    for name, device in there.items():
        kept, text = check(name, device)
        good &= kept
        print(f"check     {name}: {text}")
    if good:
        # Triton's interpreter, on CPU tensors, is for tests.
        fast = (name for name in there if name != "triton" or there[name].type == "cuda")
        name = next(fast)
        print(f"timing    {timing(name, there[name])}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
