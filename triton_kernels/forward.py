"""Forward for several queries a sequence."""

import triton
import triton.language as tl

from .arithmetic import WeightDropout, kept_weights, weighted_sum
from .rows import are_attended, attended_keys, dealt, find_tile, sequence_rows
from .scores import write_scores

SIZES = ["batch", "rows_q", "rows_k", "max_seqlen_q", "max_seqlen_k", "parts", "threshold"]


@triton.jit
def add_segment(
    scores_rows,
    query,
    query_valid,
    key,
    attended,
    value_ptr,
    stride_vt,
    sums_rows,
    largest,
    total,
    dropout,
    is_first,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    COLUMNS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Add a segment of keys to the softmax and the weighted sum of queries.

    Args:
        scores_rows: where each query's score of the segment's first key is, [BLOCK_Q].
        query, query_valid: [BLOCK_Q].
        key, attended: [COLUMNS].
        value_ptr: row 0 of the sequence.
        sums_rows: where each query's sum is, [BLOCK_Q].
        largest, total: of the scores before, and of their exponentials, [BLOCK_Q].
        is_first: whether nothing has been summed before.
        SINGLE: there is no other segment, and the sum is the context.

    Returns:
        ``largest`` and ``total``.
    """
    scores = tl.load(
        scores_rows[:, None] + tl.arange(0, COLUMNS)[None, :],
        mask=query_valid[:, None] & attended[None, :],
        other=-float("inf"),
    )
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp(scores - shift[:, None])  # [BLOCK_Q, COLUMNS]
    shrink = tl.exp(largest - shift)
    total = total * shrink + tl.sum(weights, 1)
    weights *= kept_weights(dropout, query, key)
    if SINGLE:
        weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    for begin in range(0, DV, BLOCK_DV):
        d = begin + tl.arange(0, BLOCK_DV)
        value = tl.load(
            value_ptr + key[:, None] * stride_vt + d[None, :],
            mask=attended[:, None] & (d[None, :] < DV),
            other=0.0,
        )
        sums = weighted_sum(weights, value)
        target = sums_rows[:, None] + d[None, :]
        mask = query_valid[:, None] & (d[None, :] < DV)
        if not SINGLE:
            if not is_first:
                sums += tl.load(target, mask=mask, other=0.0) * shrink[:, None]
        tl.store(target, sums.to(sums_rows.dtype.element_ty), mask=mask)
    return new_largest, total


@triton.jit(do_not_specialize=[*SIZES, "room", "processors", "stride_scores"])
def additive_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    score_weight_ptr,
    context_ptr,
    stats_ptr,
    partial_ptr,
    scores_ptr,
    order_ptr,
    cu_q_ptr,
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    batch,
    rows_q,
    rows_k,
    max_seqlen_k,
    parts,
    room,
    processors,
    threshold,
    dropout_scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_wh,
    stride_scores,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    SINGLE: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    RAW: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """``context_i = sum_j softmax_j(e_ij) value_j`` for BLOCK_Q queries of a sequence and a head.

    Keys are taken in segments: all scores of one, then its softmax, then its weighted sum. With
    ``SINGLE`` a sequence's keys are one segment, and results final. Else program (tile, head, part)
    takes each ``parts``-th segment, and leaves for ``sums.merge_parts`` its sum ``partial``
    [parts, rows, H, DV] and its (max, sum) in ``stats`` [parts, rows, H, 2].
    The tiles are in ``order``, of :func:`rows.write_order`, if it is given.
    Scores pass through ``scores`` [(parts,) rows, H, stride_scores], all of them with KEEP_SCORES;
    without ``stats`` nothing else is computed. RAW: of the scores more than differences matters.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    # Half of a segment is another program text, which of the widest is long and spills.
    HALVES: tl.constexpr = 2 if SEGMENT <= 64 else 1
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    if order_ptr is None:
        sequence, first_query = find_tile(cu_q_ptr, tl.program_id(0), batch, rows_q, BLOCK_Q)
    else:
        tiles = tl.load(order_ptr + 2 * room)
        if tl.program_id(0) >= tiles:
            return
        tile = dealt(tl.program_id(0), tiles, processors)
        sequence = tl.load(order_ptr + 2 * tile)
        first_query = tl.load(order_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_Q
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    if first_query >= length_q:
        return
    key_place, key_start, length = attended_keys(
        cu_k_ptr, key_lengths_ptr, sequence, batch, rows_k, max_seqlen_k
    )
    query = first_query + tl.arange(0, BLOCK_Q)
    query_valid = query < length_q
    query_item = query_ptr + place * stride_qb + start * stride_qt + head * stride_qh
    all_rows = rows_q
    if cu_q_ptr is None:
        all_rows = rows_q * batch
    row = (place * rows_q + start + query) * H + head
    part_row = row + part * all_rows * H
    first_row = (place * rows_q + start) * H + head
    if not KEEP_SCORES:
        first_row += part * all_rows * H
    scores_item = scores_ptr + first_row * stride_scores
    key_item = key_ptr + key_place * stride_kb + key_start * stride_kt + head * stride_kh
    value_item = value_ptr + key_place * stride_vb + key_start * stride_vt + head * stride_vh

    sums_rows = None
    if stats_ptr is not None:
        sums_rows = context_ptr + row * DV if SINGLE else partial_ptr + part_row * DV
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    # Without any key there still is a result to write: 0, by one empty segment.
    segments = tl.maximum(tl.cdiv(length, SEGMENT), 1)
    for segment in range(part, segments, parts):
        first = segment * SEGMENT
        kept = first if KEEP_SCORES else 0
        write_scores(
            query_item,
            stride_qt,
            first_query,
            length_q,
            key_item,
            stride_kt,
            first,
            tl.minimum(first + SEGMENT, length),
            length,
            score_weight_ptr + head * stride_wh,
            scores_item + kept,
            H * stride_scores,
            D,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
            RAW,
            REFINE,
            USE_PTX,
        )
        if stats_ptr is not None:
            tl.debug_barrier()  # other threads of the program read what these have written
            for half in tl.static_range(HALVES):
                if (length - first <= SEGMENT // 2) == half or HALVES == 1:
                    key = first + tl.arange(0, SEGMENT >> half).to(tl.int64)
                    largest, total = add_segment(
                        scores_item + query * H * stride_scores + kept,
                        query,
                        query_valid,
                        key,
                        are_attended(padding_mask_ptr, key_place, rows_k, key, length),
                        value_item,
                        stride_vt,
                        sums_rows,
                        largest,
                        total,
                        WeightDropout(seed_ptr, threshold, dropout_scale, sequence, head),
                        segment == part,
                        DV,
                        BLOCK_DV,
                        SEGMENT >> half,
                        SINGLE,
                    )
            tl.debug_barrier()  # the next segment overwrites the scores
    if stats_ptr is not None:
        tl.store(stats_ptr + part_row * 2, largest, mask=query_valid)
        tl.store(stats_ptr + part_row * 2 + 1, total, mask=query_valid)
