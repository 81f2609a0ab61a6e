"""Backward for several queries a sequence: from scores to the gradients of scores and of values.

With ``w_ij`` the weights, ``m_ij`` dropout's scales, ``g_ij = (dcontext_i . value_j + dweights_ij)
m_ij`` and ``s_ij`` the gradients of scores:

    s_ij = w_ij (g_ij - sum_j w_ij g_ij)        dvalue_j = sum_i w_ij m_ij dcontext_i

What follows from ``s_ij`` is in ``gradient``. Nothing is added by atomics: every sum has its owner.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import WeightDropout, kept_weights, product, weighted_sum
from .rows import ORDER_BLOCK, are_attended, attended_keys, find_tile, sequence_rows, write_order

SIZES = [
    "batch",
    "rows_q",
    "rows_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "query_tiles",
    "sequences",
    "threshold",
]
# They follow the longest sequences, and what autograd made of the gradient.
PAIR_STRIDES = [
    f"stride_{pair}"
    for pair in (
        *(f"score_{axis}" for axis in ("query_row", "key_row", "query", "key", "head")),
        *(f"dweight_{axis}" for axis in ("b", "key_row", "query", "key", "head")),
    )
]


class Softmax(NamedTuple):
    """Scores of a sequence and head from its first query and key on, and its queries' stats."""

    scores_ptr: tl.tensor
    stride_query: tl.tensor
    stride_key: tl.tensor
    stats_ptr: tl.tensor | None  # (max, sum) of each query; without them the scores are weights
    stride_stats: tl.tensor


@triton.jit
def load_softmax(softmax, query, key, are_queries, mask):
    """``exp(score - max) / sum`` [queries, keys], 0 where not in ``mask``."""
    places = query[:, None] * softmax.stride_query + key[None, :] * softmax.stride_key
    scores = tl.load(softmax.scores_ptr + places, mask=mask, other=0.0)
    if softmax.stats_ptr is None:
        return scores
    else:
        stats = softmax.stats_ptr + query * softmax.stride_stats
        largest = tl.load(stats, mask=are_queries, other=0.0)
        total = tl.load(stats + 1, mask=are_queries, other=1.0)
        total = tl.where(total == 0.0, 1.0, total)
        weights = tl.exp(tl.where(mask, scores - largest[:, None], -float("inf")))
        return weights / total[:, None]


@triton.jit(do_not_specialize=SIZES + PAIR_STRIDES)
def additive_attention_bwd_scores_kernel(
    value_ptr,
    dcontext_ptr,
    dweights_ptr,
    stats_ptr,
    scores_ptr,
    dscores_ptr,
    dvalue_ptr,
    order_ptr,
    cu_q_ptr,
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    batch,
    rows_q,
    rows_k,
    max_seqlen_q,
    max_seqlen_k,
    query_tiles,
    sequences,
    threshold,
    dropout_scale,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_cb,
    stride_ct,
    stride_ch,
    stride_score_query_row,
    stride_score_key_row,
    stride_score_query,
    stride_score_key,
    stride_score_head,
    stride_dweight_b,
    stride_dweight_key_row,
    stride_dweight_query,
    stride_dweight_key,
    stride_dweight_head,
    stride_dscores,
    H: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SEGMENT_Q: tl.constexpr,
    SINGLE_Q: tl.constexpr,
):
    """Score gradients of BLOCK_Q queries and a head, or value gradients of BLOCK_K keys and a head.

    The first ``query_tiles`` programs do the former, the others the latter, over SEGMENT_Q queries
    at a time, with SINGLE_Q all of a sequence. Score gradients go to float32 [rows, H,
    stride_dscores], for all keys of whole tiles of BLOCK_K, 0 where not attended. Scores and
    ``dweights`` are addressed as in ``additive_attention_weights_kernel``. Without ``stats`` the
    gradients of scores are ``dweights``, or ``scores`` are the weights after dropout. ``order`` is
    for the gradient pass: the sequences, those with most pairs first.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if tile < query_tiles:
        sequence, first = find_tile(cu_q_ptr, tile, batch, rows_q, BLOCK_Q)
        if order_ptr is not None:
            if (first == 0) & (head == 0):
                write_order(
                    order_ptr,
                    sequence,
                    sequences,
                    sequences,
                    cu_q_ptr,
                    cu_k_ptr,
                    key_lengths_ptr,
                    batch,
                    rows_q,
                    rows_k,
                    max_seqlen_k,
                    0,
                    ORDER_BLOCK,
                )
    else:
        sequence, first = find_tile(cu_k_ptr, tile - query_tiles, batch, rows_k, BLOCK_K)
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    key_place, key_start, extent = sequence_rows(cu_k_ptr, sequence, batch, rows_k)
    _, _, length = attended_keys(cu_k_ptr, key_lengths_ptr, sequence, batch, rows_k, max_seqlen_k)
    row = place * rows_q + start
    key_row = key_place * rows_k + key_start
    scores_item = scores_ptr
    if scores_ptr is not None:
        scores_item += row * stride_score_query_row + key_row * stride_score_key_row
        scores_item += head * stride_score_head
    softmax = Softmax(
        scores_item,
        stride_score_query,
        stride_score_key,
        None if stats_ptr is None else stats_ptr + (row * H + head) * 2,
        H * 2,
    )
    dropout = WeightDropout(seed_ptr, threshold, dropout_scale, sequence, head)
    dcontext_item = dcontext_ptr
    if dcontext_ptr is not None:
        dcontext_item += place * stride_cb + start * stride_ct + head * stride_ch
    if dscores_ptr is not None:
        if tile < query_tiles:
            query = first + tl.arange(0, BLOCK_Q)
            are_queries = query < length_q
            column = tl.arange(0, BLOCK_K).to(tl.int64)
            dscores_rows = dscores_ptr + ((row + query) * H + head) * stride_dscores
            value_item = (
                value_ptr + key_place * stride_vb + key_start * stride_vt + head * stride_vh
            )
            keys = tl.where(first < length_q, length, 0)
            delta = tl.zeros((BLOCK_Q,), tl.float32)
            sum_of_weights = tl.zeros((BLOCK_Q,), tl.float32)
            for begin in range(0, keys, BLOCK_K):
                key = begin + column
                attended = are_attended(padding_mask_ptr, key_place, rows_k, key, length)
                mask = are_queries[:, None] & attended[None, :]
                gradient = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                if dcontext_ptr is not None:
                    dcontext_rows = dcontext_item + tl.minimum(query, length_q - 1) * stride_ct
                    for begin_d in range(0, DV, BLOCK_DV):
                        d = begin_d + tl.arange(0, BLOCK_DV)
                        dcontext = tl.load(
                            dcontext_rows[:, None] + d[None, :], mask=d[None, :] < DV, other=0.0
                        )
                        value = tl.load(
                            value_item + key[None, :] * stride_vt + d[:, None],
                            mask=attended[None, :] & (d[:, None] < DV),
                            other=0.0,
                        )
                        gradient += product(dcontext, value)
                if dweights_ptr is not None:
                    gradient += tl.load(
                        dweights_ptr
                        + sequence.to(tl.int64) * stride_dweight_b
                        + key_row * stride_dweight_key_row
                        + head * stride_dweight_head
                        + query[:, None] * stride_dweight_query
                        + key[None, :] * stride_dweight_key,
                        mask=mask & (query < max_seqlen_q)[:, None],
                        other=0.0,
                    ).to(tl.float32)
                gradient *= kept_weights(dropout, query, key)
                if stats_ptr is not None:
                    weights = load_softmax(softmax, query, key, are_queries, mask)
                    delta += tl.sum(weights * gradient, 1)
                    sum_of_weights += tl.sum(weights, 1)
                tl.store(dscores_rows[:, None] + key[None, :], gradient, mask=are_queries[:, None])
            if stats_ptr is not None:
                # Rounded weights need not sum to 1, but score gradients to 0.
                delta = delta / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
                tl.debug_barrier()  # other threads may have written what comes back here
                for begin in range(0, keys, BLOCK_K):
                    key = begin + column
                    attended = are_attended(padding_mask_ptr, key_place, rows_k, key, length)
                    mask = are_queries[:, None] & attended[None, :]
                    places = dscores_rows[:, None] + key[None, :]
                    gradient = tl.load(places, mask=are_queries[:, None], other=0.0)
                    weights = load_softmax(softmax, query, key, are_queries, mask)
                    tl.debug_barrier()  # all has been read before it is replaced
                    tl.store(
                        places, weights * (gradient - delta[:, None]), mask=are_queries[:, None]
                    )
    if dvalue_ptr is not None:
        if tile >= query_tiles:
            key = first + tl.arange(0, BLOCK_K)
            attended = are_attended(padding_mask_ptr, key_place, rows_k, key, length)
            line = tl.arange(0, SEGMENT_Q).to(tl.int64)
            queries = tl.where(first < length, length_q, 0)
            if SINGLE_Q:
                weights = value_weights(softmax, dropout, line, key, queries, attended)
            dvalue_rows = dvalue_ptr + ((key_row + key) * H + head) * DV
            for begin_d in range(0, tl.where(first < extent, DV, 0), BLOCK_DV):
                d = begin_d + tl.arange(0, BLOCK_DV)
                dcontext = dcontext_item + d
                if SINGLE_Q:
                    sums = value_sums(weights, dcontext, stride_ct, line, queries, d, DV)
                else:
                    sums = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
                    for begin in range(0, queries, SEGMENT_Q):
                        query = begin + line
                        weights = value_weights(softmax, dropout, query, key, queries, attended)
                        sums += value_sums(weights, dcontext, stride_ct, query, queries, d, DV)
                tl.store(
                    dvalue_rows[:, None] + d[None, :],
                    sums.to(dvalue_ptr.dtype.element_ty),
                    mask=(key < extent)[:, None] & (d < DV)[None, :],
                )


@triton.jit
def value_weights(softmax, dropout, query, key, queries, attended):
    """The weights after dropout [keys, queries], 0 for queries past the last."""
    are_queries = query < queries
    mask = are_queries[:, None] & attended[None, :]
    weights = load_softmax(softmax, query, key, are_queries, mask)
    return tl.trans(weights * kept_weights(dropout, query, key))


@triton.jit
def value_sums(weights, dcontext, stride, query, queries, d, DV: tl.constexpr):
    """``sum_i w_ij dcontext_i`` [keys, features] of the queries and features of these numbers."""
    mask = (query < queries)[:, None] & (d < DV)[None, :]
    rows = tl.load(dcontext[None, :] + query[:, None] * stride, mask=mask, other=0.0)
    return weighted_sum(weights, rows)
