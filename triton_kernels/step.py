"""One query a sequence: bound by memory, so keys and values are read as few times as can be.

A program takes a tile of SEGMENT keys of one sequence and one head. With ``SINGLE`` the tile holds
all keys of the sequence and its results are final; else the parts are merged by other kernels.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import add_square, dropout_scales, tanh_and_derivative
from .route import (
    INFORMATIVE_SHARE,
    LARGEST_WEIGHT_NORM,
    LEAST_SCORE,
    SATURATED_MAGNITUDE,
    SMALL_MAGNITUDE,
)
from .rows import are_attended, attended_keys, find_tile
from .scores import load_weights

SIZES = ["batch", "rows_k", "max_seqlen_k", "threshold", "tiles"]
# Tiles of keys and values are on their way while the one before is worked on.
STAGES = tl.constexpr(3)


class Rows(NamedTuple):
    """Where the rows of a sequence and head are: the query's, and row 0 of keys and values."""

    query: tl.tensor
    key: tl.tensor
    stride_kt: tl.tensor
    value: tl.tensor
    stride_vt: tl.tensor
    score_weight: tl.tensor


class Keys(NamedTuple):
    """The keys of a sequence and head from ``first`` on, and what says which of them count."""

    sequence: tl.tensor
    head: tl.tensor
    place: tl.tensor
    rows_k: tl.tensor
    first: tl.tensor
    length: tl.tensor
    padding_mask_ptr: tl.tensor | None
    seed_ptr: tl.tensor | None
    threshold: tl.tensor
    dropout_scale: tl.tensor


class Options(NamedTuple):
    """Known to the compiler as long as no variable holds them: to be made where they are passed."""

    H: tl.constexpr
    D: tl.constexpr
    DV: tl.constexpr
    SEGMENT: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    SINGLE: tl.constexpr
    USE_PTX: tl.constexpr


@triton.jit
def aligned(stride, ALIGNMENT: tl.constexpr):
    """The stride, which ALIGNMENT divides, in a form that tells the compiler so.

    The one ALIGNMENT is that of all tensors of a call: odd feature counts, the reason for 1, mostly
    are those of keys and values both, and a flag for each would compile every mixture anew.
    """
    return stride // ALIGNMENT * ALIGNMENT


@triton.jit
def load_tile(rows_ptr, attended, d, DIM: tl.constexpr):
    """``[rows, features]`` as float32; 0 where not attended, whatever is there."""
    mask = attended[:, None] & (d < DIM)[None, :]
    return tl.load(rows_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_row(row_ptr, d, DIM: tl.constexpr):
    """``[features]`` as float32."""
    return tl.load(row_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)


@triton.jit
def sum_of_tanh(rows, position, attended, options, EXACT: tl.constexpr, RAW: tl.constexpr):
    """``sum_d w_d tanh(q_d + k_jd)``, [SEGMENT], and whether that needed no EXACT tanh.

    Where few of the score weights meet a tanh that is neither nearly 0 nor nearly 1, or weights are
    large, scores would show its error; RAW ones, which are returned, also where all are small.
    """
    D: tl.constexpr = options.D
    BLOCK_D: tl.constexpr = options.BLOCK_D
    key_rows = rows.key + position * rows.stride_kt
    sums = tl.zeros((options.SEGMENT, BLOCK_D), tl.float32)
    informative = tl.zeros((options.SEGMENT, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_tile(key_rows, attended, d, D) + load_row(rows.query, d, D)[None, :]
        tanh, _ = tanh_and_derivative(x, EXACT, options.USE_PTX)
        weight = load_weights(rows.score_weight, d, D, D % BLOCK_D != 0)
        sums += weight[None, :] * tanh
        if not EXACT:
            size = tl.abs(x)
            informs = (size > SMALL_MAGNITUDE) & (size < SATURATED_MAGNITUDE)
            informative += tl.where(informs, tl.abs(weight)[None, :], 0.0)
            total += tl.abs(weight)
            squares = add_square(squares, weight)
    share = tl.sum(tl.where(attended, tl.sum(informative, 1), 0.0), 0)
    least = tl.sum(attended.to(tl.float32), 0) * tl.sum(total, 0) * INFORMATIVE_SHARE
    square = tl.sum(squares, 0)
    will_do = (share > least) & (square <= LARGEST_WEIGHT_NORM * LARGEST_WEIGHT_NORM)
    scores = tl.sum(sums, 1)
    if RAW:
        largest = tl.max(tl.where(attended, tl.abs(scores), 0.0), 0)
        will_do = will_do & (largest >= tl.sqrt(square) * LEAST_SCORE)
    return scores, will_do


@triton.jit
def step_scores(rows, position, attended, options, RAW: tl.constexpr):
    """Scores [SEGMENT] of one query, by the EXACT tanh where the other's errors would show."""
    scores, will_do = sum_of_tanh(rows, position, attended, options, False, RAW)
    if not will_do:
        scores, _ = sum_of_tanh(rows, position, attended, options, True, RAW)
    return scores


@triton.jit
def attended_of(keys, position):
    """Which key positions count."""
    return are_attended(keys.padding_mask_ptr, keys.place, keys.rows_k, position, keys.length)


@triton.jit
def dropout_of(keys, position):
    """What dropout makes of weights of 1, [SEGMENT]."""
    if keys.seed_ptr is None:
        return tl.full(position.shape, 1.0, tl.float32)
    else:
        return dropout_scales(
            keys.seed_ptr,
            keys.threshold,
            keys.dropout_scale,
            keys.sequence,
            keys.head,
            position * 0,
            position,
        )


@triton.jit
def step_context(rows, keys, context_row, stats_row, scores_row, options):
    """What :func:`additive_attention_step_fwd_kernel` writes for SEGMENT keys.

    Args:
        rows, keys, options: :class:`Rows`, :class:`Keys`, :class:`Options`.
        context_row, stats_row: where results go, or None: only scores are wanted.
        scores_row: where the score of key 0 goes, those of others H apart, or None.
    """
    position = keys.first + tl.arange(0, options.SEGMENT)
    attended = attended_of(keys, position)
    value_rows = rows.value + position * rows.stride_vt
    scores = step_scores(rows, position, attended, options, stats_row is None)
    if scores_row is not None:
        tl.store(scores_row + position * options.H, scores, mask=attended)
    if stats_row is not None:
        scores = tl.where(attended, scores, -float("inf"))
        largest = tl.max(scores, 0)
        weights = tl.exp(scores - tl.where(largest == -float("inf"), 0.0, largest))
        total = tl.sum(weights, 0)
        tl.store(stats_row, largest)
        tl.store(stats_row + 1, total)
        if options.SINGLE:
            weights = weights / tl.where(total == 0.0, 1.0, total)
        weights *= dropout_of(keys, position)
        for begin in tl.range(0, options.DV, options.BLOCK_DV, num_stages=STAGES):
            d = begin + tl.arange(0, options.BLOCK_DV)
            context = tl.sum(weights[:, None] * load_tile(value_rows, attended, d, options.DV), 0)
            tl.store(context_row + d, context.to(context_row.dtype.element_ty), mask=d < options.DV)


@triton.jit(do_not_specialize=SIZES)
def additive_attention_step_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    score_weight_ptr,
    context_ptr,
    stats_ptr,
    scores_ptr,
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    batch,
    rows_k,
    max_seqlen_k,
    threshold,
    dropout_scale,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_wh,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINGLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """``context = sum_j softmax_j(e_j) value_j``; not SINGLE: the unscaled sum of a tile's keys.

    ``context`` and ``stats`` (max, sum) are those of a sequence, or float32 of a tile. ``scores``
    [rows, H], if any, are what weights are computed from. Either those or these may be None.
    """
    rows_k = rows_k.to(tl.int64)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first = find_tile(cu_k_ptr, tile, batch, rows_k, SEGMENT)
    if (sequence >= batch) | (SINGLE & (first > 0)):
        return
    place, start, length = attended_keys(
        cu_k_ptr, key_lengths_ptr, sequence, batch, rows_k, max_seqlen_k
    )
    stride_kt = aligned(stride_kt, ALIGNMENT)
    stride_vt = aligned(stride_vt, ALIGNMENT)
    query_row = query_ptr + sequence.to(tl.int64) * aligned(stride_qb, ALIGNMENT)
    key_rows = key_ptr + place * aligned(stride_kb, ALIGNMENT) + start * stride_kt
    value_rows = value_ptr + place * aligned(stride_vb, ALIGNMENT) + start * stride_vt
    rows = Rows(
        query_row + head * aligned(stride_qh, ALIGNMENT),
        key_rows + head * aligned(stride_kh, ALIGNMENT),
        stride_kt,
        value_rows + head * aligned(stride_vh, ALIGNMENT),
        stride_vt,
        score_weight_ptr + head * aligned(stride_wh, ALIGNMENT),
    )
    keys = Keys(
        sequence,
        head,
        place,
        rows_k,
        first,
        length,
        padding_mask_ptr,
        seed_ptr,
        threshold,
        dropout_scale,
    )
    scores_row = scores_ptr
    if scores_ptr is not None:
        scores_row += (place * rows_k + start) * H + head
    target = (sequence if SINGLE else tile).to(tl.int64) * H + head
    context_row = context_ptr
    stats_row = stats_ptr
    if stats_ptr is not None:
        context_row += target * DV
        stats_row += target * 2
    for half in tl.static_range(2):
        if (length - first <= SEGMENT // 2) == half:
            step_context(
                rows,
                keys,
                context_row,
                stats_row,
                scores_row,
                Options(
                    H, D, DV, SEGMENT >> half, BLOCK_D << half, BLOCK_DV << half, SINGLE, USE_PTX
                ),
            )
