"""What one would otherwise get: accurate tanh of an (i, j, d) tile, compiled like our kernels."""

from collections.abc import Iterator
from types import SimpleNamespace

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def tanh_score_kernel(
    query_ptr,  # (Tq, D)
    key_ptr,  # (Tk, D)
    score_weight_ptr,  # (D,)
    score_ptr,  # (Tq, Tk)
    num_keys,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``score[i, j] = sum_d score_weight[d] * tanh(query[i, d] + key[j, d])``, as it is written."""
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_Q, BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        query = tl.load(query_ptr + i[:, None] * D + d[None, :]).to(tl.float32)
        key = tl.load(key_ptr + j[:, None] * D + d[None, :]).to(tl.float32)
        weight = tl.load(score_weight_ptr + d).to(tl.float32)
        tanh = libdevice.tanh(query[:, None, :] + key[None, :, :])
        total += weight[None, None, :] * tanh
    tl.store(score_ptr + i[:, None] * num_keys + j[None, :], tl.sum(total, 2))


def static_cases() -> Iterator[SimpleNamespace]:
    """The yardstick as a row of ``benchmarks.static``."""
    pointers = ("query_ptr", "key_ptr", "score_weight_ptr", "score_ptr")
    constants = {"D": 1024, "BLOCK_Q": 16, "BLOCK_K": 16, "BLOCK_D": 16}
    signature = {
        **dict.fromkeys(pointers, "*bf16"),
        "num_keys": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    yield SimpleNamespace(
        name="libdevice.tanh",
        kernel=tanh_score_kernel,
        signature=signature,
        constants=constants,
        aligned=set(pointers),
        num_warps=4,
        num_stages=1,
        regime="all",
        pass_="forward",
        dtype="bf16",
        dim=1024,
        elements_per_iteration=16 * 16 * 16,
        iterations=1024 // 16,
    )
