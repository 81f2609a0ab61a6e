"""Hidden rows of keys that are scored without a query, for pooling: what its kernels share.

They are ``h_jd = tanh(k_jd) sigmoid(g_jd)``, or without a gate ``tanh(k_jd)``, with some entries of
either factor dropped out. A program takes SEGMENT keys of one sequence and one head, and has what
it needs of each of GROUP rows of score weights, the branches, in a tuple.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    LN_2,
    LOG2_E,
    add_product,
    dropout_scales,
    reciprocal,
    tanh_and_derivative,
)
from .problem import Problem, describe, rows_of, strides_of
from .route import VANISHING_SLOPE
from .rows import are_attended, attended_keys, find_tile, sequence_rows
from .step import aligned, load_row, load_tile

SIZES = ["batch", "rows_k", "max_seqlen_k", "threshold", "tanh_threshold", "gate_threshold"]


class KeyTile(NamedTuple):
    """The SEGMENT keys of a program, from the ``first`` of a sequence that has ``extent``."""

    sequence: tl.tensor
    head: tl.tensor
    place: tl.tensor
    first: tl.tensor
    extent: tl.tensor
    position: tl.tensor  # [SEGMENT], in the sequence
    key: tl.tensor  # [SEGMENT], in the place
    row: tl.tensor  # [SEGMENT], among the rows of all places
    attended: tl.tensor  # [SEGMENT]


class Dropout(NamedTuple):
    """Which entries of one factor of the hidden rows are kept: all where threshold is None."""

    seed_ptr: tl.tensor | None
    threshold: tl.tensor | None
    scale: tl.tensor | None


@triton.jit
def key_tile(cu_k_ptr, lengths_ptr, mask_ptr, batch, rows_k, max_seqlen_k, SEGMENT: tl.constexpr):
    """The program's :class:`KeyTile`."""
    rows_k = rows_k.to(tl.int64)
    sequence, first = find_tile(cu_k_ptr, tl.program_id(0), batch, rows_k, SEGMENT)
    place, start, extent = sequence_rows(cu_k_ptr, sequence, batch, rows_k)
    _, _, length = attended_keys(cu_k_ptr, lengths_ptr, sequence, batch, rows_k, max_seqlen_k)
    position = first + tl.arange(0, SEGMENT)
    key = start + position
    return KeyTile(
        sequence,
        tl.program_id(1).to(tl.int64),
        place,
        first,
        extent,
        position,
        key,
        place * rows_k + key,
        are_attended(mask_ptr, place, rows_k, position, length),
    )


@triton.jit
def rows_of_tile(rows_ptr, tile, stride_b, stride_t, stride_h, ALIGNMENT: tl.constexpr):
    """Pointers to the rows of keys, gates or values, [SEGMENT]."""
    rows_ptr += tile.place * aligned(stride_b, ALIGNMENT)
    rows_ptr += tile.head * aligned(stride_h, ALIGNMENT)
    return rows_ptr + tile.key * aligned(stride_t, ALIGNMENT)


@triton.jit
def kept_features(dropout, tile, begin, FACTOR: tl.constexpr, BLOCK_D: tl.constexpr):
    """What features from ``begin`` on are multiplied by, [SEGMENT, BLOCK_D], or 1 for all.

    As ``reference.feature_keep_mask``: the four words of a counter are of four features.
    """
    if dropout.threshold is None:
        return 1.0
    else:
        group = begin // 4 + tl.arange(0, BLOCK_D // 4)
        key, group = tl.broadcast(tile.position.to(tl.int32)[:, None], group[None, :])
        number = group * 0 - 1 - (2 * tile.head + FACTOR).to(tl.int32)
        sequence = group * 0 + tile.sequence
        a, b, c, d = tl.philox(tl.load(dropout.seed_ptr), key, group, number, sequence)
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        keep = (word >> 8).to(tl.int32) >= dropout.threshold
        return tl.where(keep, dropout.scale, 0.0)


@triton.jit
def kept_weights(seed_ptr, threshold, scale, tile, branch):
    """What the weights of a branch are multiplied by, [SEGMENT], or 1 for all."""
    if seed_ptr is None:
        return 1.0
    else:
        branches = tile.position * 0 + branch
        return dropout_scales(
            seed_ptr, threshold, scale, tile.sequence, tile.head, branches, tile.position
        )


@triton.jit
def hidden_and_slopes(
    keys,
    gates,
    tile,
    of_tanh,
    of_gate,
    begin,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """``h``, ``dh / dk`` and ``dh / dg`` of features from ``begin`` on, [SEGMENT, BLOCK_D] each.

    Args:
        keys, gates: pointers to rows, [SEGMENT]; gates may be None, and then the last is nothing.
        tile: :class:`KeyTile`.
        of_tanh, of_gate: :class:`Dropout`.
    """
    d = begin + tl.arange(0, BLOCK_D)
    tanh, slope = tanh_and_derivative(load_tile(keys, tile.attended, d, D), True, USE_PTX)
    kept = kept_features(of_tanh, tile, begin, 0, BLOCK_D)
    tanh *= kept
    slope = tl.where(slope < VANISHING_SLOPE, 0.0, slope) * kept
    if gates is None:
        return tanh, slope, slope
    else:
        gate = load_tile(gates, tile.attended, d, D)
        size = tl.abs(gate)
        decay = tl.exp(-size)  # may be subnormal, while PTX's exp2 flushes to 0
        decay += decay * tl.fma(size * LOG2_E, LN_2, -size)  # for its exponent's rounding
        larger = reciprocal(1.0 + decay, USE_PTX)  # sigmoid(|g|)
        smaller = decay * larger  # sigmoid(-|g|)
        kept = kept_features(of_gate, tile, begin, 1, BLOCK_D)
        sigmoid = tl.where(gate < 0, smaller, larger) * kept
        return tanh * sigmoid, slope * sigmoid, tanh * (smaller * larger * kept)


@triton.jit
def zeros_of_branches(GROUP: tl.constexpr, SEGMENT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(GROUP):
        zeros += (tl.zeros((SEGMENT,), tl.float32),)
    return zeros


@triton.jit
def add_products(
    sums,
    rows,
    vectors_ptr,
    stride,
    branch,
    d,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """``sums_k [j] + sum_d rows_jd v_kd`` for the GROUP branches from ``branch`` on.

    Args:
        sums: a tuple of [SEGMENT].
        rows: [SEGMENT, features], those of numbers d.
        vectors_ptr: of ``v``, branches ``stride`` apart.
    """
    added = ()
    for i in tl.static_range(GROUP):
        sum_ = sums[i]
        if branch + i < K:
            vector = load_row(vectors_ptr + (branch + i) * stride, d, DIM)
            products = rows * vector[None, :]
            if ALIGNMENT == 1:  # a thread may have only one of them
                products = add_product(tl.zeros_like(rows), rows, vector[None, :])
            sum_ += tl.sum(products, 1)
        added += (sum_,)
    return added


@triton.jit
def first_branch(GROUP: tl.constexpr, K: tl.constexpr):
    """Of those of a program; known to the compiler where all are."""
    if GROUP < K:
        return tl.program_id(2) * GROUP
    else:
        return 0


def describe_pool(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    cu: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Problem:
    """The branches take the place of the queries of a sequence."""
    # An unknown bound needs no reading: nothing but SINGLE depends on it.
    longest = min(max_seqlen, key.size(1))
    branches = score_weight.size(1)
    return describe(
        score_weight, key, value, None, cu, lengths, mask, branches, longest, dropout_p, seed
    )


def feature_dropout(seed: Tensor | None, *probabilities: float) -> tuple:
    """The seed, and a threshold and a scale for tanh and gate each; None where all is kept."""
    arguments: list = [seed if any(p > 0 for p in probabilities) else None]
    for p in probabilities:
        scale = 1 / (1 - p) if p < 1 else 0.0
        arguments += [math.ceil(p * 2**24), scale] if p > 0 else [None, None]
    return tuple(arguments)


def gate_rows(gate: Tensor | None) -> Tensor | None:
    """As ``rows_of``, of a gate if there is one."""
    return None if gate is None else rows_of(gate)


def strides_of_gate(gate: Tensor | None, cu: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if gate is None else strides_of(gate, cu)
