"""Large gradients on the CPU: their memory serves the next call, and never two tensors at once."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_ext

KEYS, FEATURES = 20_000, 128  # 10 MB of float32: csrc/kept_memory.cpp keeps from 4 MiB on

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is kept elsewhere"),
    pytest.mark.skipif(
        torch.__version__ < (2, 11), reason="PyTorch 2.10 takes no memory of others with a deleter"
    ),
]


def inputs(dtype: torch.dtype = torch.float32, keys: int = KEYS) -> tuple[Tensor, ...]:
    shapes = (1, FEATURES), (keys, FEATURES), (keys, FEATURES), (FEATURES,)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def gradients(leaves: tuple[Tensor, ...], rows: int = KEYS) -> tuple[Tensor, ...]:
    """Of one query over the first ``rows`` keys; the others belong to nobody."""
    cu_seqlens_k = torch.tensor([0, rows])
    keywords = {"cu_seqlens_k": cu_seqlens_k, "backend": "cpu"}
    # Deterministic calls get new memory, which PyTorch may fill.
    context = attn_ext.additive_attention(*leaves, **keywords, deterministic=False)
    return torch.autograd.grad(context.sum(), leaves)


@pytest.fixture(autouse=True)
def nothing_kept():
    torch.ops.attn_ext.cpu_empty_cache()
    yield
    torch.ops.attn_ext.cpu_empty_cache()


def test_memory_that_was_let_go_is_used_again():
    leaves = inputs()
    first = gradients(leaves)
    places = {first[1].data_ptr(), first[2].data_ptr()}
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(torch.nan)
    del first, gradient
    again = gradients(leaves)
    assert {again[1].data_ptr(), again[2].data_ptr()} == places
    assert all(map(torch.equal, again, expected))


def test_memory_that_is_held_is_left_alone():
    leaves = inputs()
    held = gradients(leaves)
    part = gradients(leaves)[2][5:7]  # a view holds its tensor's memory
    expected = [gradient.clone() for gradient in (*held, part)]
    gradients(inputs())
    assert all(map(torch.equal, (*held, part), expected))


def test_larger_tensors_get_memory_of_their_size():
    first = gradients(inputs())
    places = {gradient.data_ptr() for gradient in first[1:3]}
    del first
    larger = gradients(inputs(keys=3 * KEYS), 3 * KEYS)
    assert places.isdisjoint(gradient.data_ptr() for gradient in larger[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_nobody_are_zero_in_used_memory(dtype: torch.dtype):
    leaves = inputs(dtype)
    for gradient in gradients(leaves):
        gradient.fill_(torch.nan)
    del gradient
    for gradient in gradients(leaves, KEYS // 3)[1:3]:
        assert gradient.isfinite().all() and (gradient[: KEYS // 3] != 0).any(1).all()
        assert (gradient[KEYS // 3 :] == 0).all()


def lazily_free() -> int:
    """Bytes of this process that the kernel may take back at any time."""
    path = Path("/proc/self/smaps_rollup")
    if not path.exists():
        pytest.skip(f"this system has no {path}")
    lines = path.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("LazyFree"))


def test_what_is_kept_is_the_kernels_to_take_and_can_be_given_back():
    before = lazily_free()
    gradients(inputs())
    assert lazily_free() - before > KEYS * FEATURES * 4  # of two gradients that are as large
    torch.ops.attn_ext.cpu_empty_cache()
    assert lazily_free() - before < KEYS * FEATURES * 4


def test_deterministic_calls_get_new_memory():
    leaves = inputs()
    first = gradients(leaves)
    places = {gradient.data_ptr() for gradient in first[1:3]}
    del first
    context = attn_ext.additive_attention(
        *leaves, cu_seqlens_k=torch.tensor([0, KEYS]), backend="cpu", deterministic=True
    )
    again = torch.autograd.grad(context.sum(), leaves)
    assert places.isdisjoint(gradient.data_ptr() for gradient in again[1:3])


def test_threads_share_what_is_kept():
    """Each finds its own gradients in its memory, whoever had it before."""
    leaves = [inputs() for _ in range(4)]
    expected = [gradients(own) for own in leaves]

    def repeat(n: int) -> bool:
        return all(all(map(torch.equal, gradients(leaves[n]), expected[n])) for _ in range(5))

    with ThreadPoolExecutor(len(leaves)) as pool:
        assert all(pool.map(repeat, range(len(leaves))))
