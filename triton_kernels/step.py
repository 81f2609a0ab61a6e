"""One query a sequence: bound by memory, so keys and values are read as few times as can be.

A program takes a tile of SEGMENT keys of one sequence and one head. With ``SINGLE`` the tile holds
all keys of the sequence and its results are final; else the parts are merged by other kernels.
"""

import triton
import triton.language as tl

from .arithmetic import dropout_scales, tanh_and_derivative
from .rows import are_attended, attended_keys, find_tile
from .scores import (
    INFORMATIVE_SHARE,
    LARGEST_WEIGHT_NORM,
    SATURATED_MAGNITUDE,
    SMALL_MAGNITUDE,
    load_weights,
)

SIZES = ["batch", "rows_k", "max_seqlen_k", "threshold", "tiles"]
# Tiles of keys and values are on their way while the one before is worked on.
STAGES = tl.constexpr(3)


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
def sum_of_tanh(
    query_row,
    key_rows,
    attended,
    score_weight_ptr,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """``sum_d w_d tanh(q_d + k_jd)``, [SEGMENT], and whether that needed no EXACT tanh.

    Where few of the score weights meet a tanh that is neither nearly 0 nor nearly 1, or weights are
    large, scores would show its error.
    """
    sums = tl.zeros((SEGMENT, BLOCK_D), tl.float32)
    informative = tl.zeros((SEGMENT, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_tile(key_rows, attended, d, D) + load_row(query_row, d, D)[None, :]
        tanh, _ = tanh_and_derivative(x, EXACT, USE_PTX)
        weight = load_weights(score_weight_ptr, d, D, D % BLOCK_D != 0)
        sums += weight[None, :] * tanh
        if not EXACT:
            size = tl.abs(x)
            informs = (size > SMALL_MAGNITUDE) & (size < SATURATED_MAGNITUDE)
            informative += tl.where(informs, tl.abs(weight)[None, :], 0.0)
            total += tl.abs(weight)
            squares += weight * weight
    share = tl.sum(tl.where(attended, tl.sum(informative, 1), 0.0), 0)
    least = INFORMATIVE_SHARE * tl.sum(attended.to(tl.float32), 0) * tl.sum(total, 0)
    fit = tl.sum(squares, 0) <= LARGEST_WEIGHT_NORM * LARGEST_WEIGHT_NORM
    return tl.sum(sums, 1), (share > least) & fit


@triton.jit
def step_scores(
    query_row,
    key_rows,
    attended,
    score_weight_ptr,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Scores [SEGMENT] of one query, by the EXACT tanh where the other's errors would show."""
    scores, will_do = sum_of_tanh(
        query_row, key_rows, attended, score_weight_ptr, D, SEGMENT, BLOCK_D, False, USE_PTX
    )
    if not will_do:
        scores, _ = sum_of_tanh(
            query_row, key_rows, attended, score_weight_ptr, D, SEGMENT, BLOCK_D, True, USE_PTX
        )
    return scores


@triton.jit
def step_context(
    query_row,
    key_rows_ptr,
    stride_kt,
    value_rows_ptr,
    stride_vt,
    weight_row,
    context_row,
    stats_row,
    score_rows_ptr,
    padding_mask_ptr,
    seed_ptr,
    threshold,
    dropout_scale,
    place,
    rows_k,
    sequence,
    head,
    first,
    length,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINGLE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """What :func:`additive_attention_step_fwd_kernel` writes for keys [first, first + SEGMENT).

    Rows are those of the query, and of the results; ``key_rows_ptr``, ``value_rows_ptr`` and
    ``score_rows_ptr`` are row 0 of the sequence.
    """
    position = first + tl.arange(0, SEGMENT)
    attended = are_attended(padding_mask_ptr, place, rows_k, position, length)
    key_rows = key_rows_ptr + position * stride_kt
    value_rows = value_rows_ptr + position * stride_vt
    scores = step_scores(query_row, key_rows, attended, weight_row, D, SEGMENT, BLOCK_D, USE_PTX)
    if score_rows_ptr is not None:
        tl.store(score_rows_ptr + position * H, scores, mask=attended)
    scores = tl.where(attended, scores, -float("inf"))
    largest = tl.max(scores, 0)
    weights = tl.exp(scores - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    tl.store(stats_row, largest)
    tl.store(stats_row + 1, total)
    if SINGLE:
        weights = weights / tl.where(total == 0.0, 1.0, total)
    if seed_ptr is not None:
        weights *= dropout_scales(
            seed_ptr, threshold, dropout_scale, sequence, head, position * 0, position
        )
    for begin in tl.range(0, DV, BLOCK_DV, num_stages=STAGES):
        d = begin + tl.arange(0, BLOCK_DV)
        context = tl.sum(weights[:, None] * load_tile(value_rows, attended, d, DV), 0)
        tl.store(context_row + d, context.to(context_row.dtype.element_ty), mask=d < DV)


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
    [rows, H], if any, are what weights are computed from.
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
    key_rows_ptr = key_ptr + place * aligned(stride_kb, ALIGNMENT) + start * stride_kt
    value_rows_ptr = value_ptr + place * aligned(stride_vb, ALIGNMENT) + start * stride_vt
    score_rows_ptr = scores_ptr
    if scores_ptr is not None:
        score_rows_ptr += (place * rows_k + start) * H + head
    target = (sequence if SINGLE else tile).to(tl.int64) * H + head
    for half in tl.static_range(2):
        if (length - first <= SEGMENT // 2) == half:
            step_context(
                query_ptr
                + sequence.to(tl.int64) * aligned(stride_qb, ALIGNMENT)
                + head * aligned(stride_qh, ALIGNMENT),
                key_rows_ptr + head * aligned(stride_kh, ALIGNMENT),
                stride_kt,
                value_rows_ptr + head * aligned(stride_vh, ALIGNMENT),
                stride_vt,
                score_weight_ptr + head * aligned(stride_wh, ALIGNMENT),
                context_ptr + target * DV,
                stats_ptr + target * 2,
                score_rows_ptr,
                padding_mask_ptr,
                seed_ptr,
                threshold,
                dropout_scale,
                place,
                rows_k,
                sequence,
                head,
                first,
                length,
                H,
                D,
                DV,
                SEGMENT >> half,
                BLOCK_D << half,
                BLOCK_DV << half,
                SINGLE,
                USE_PTX,
            )
