"""Backward for several queries a sequence: from scores to the gradients of scores and of values.

With ``w_ij`` the weights, ``m_ij`` dropout's scales, ``g_ij = (dcontext_i . value_j + dweights_ij)
m_ij`` and ``s_ij`` the gradients of scores:

    s_ij = w_ij (g_ij - sum_j w_ij g_ij)        dvalue_j = sum_i w_ij m_ij dcontext_i

What follows from ``s_ij`` is in ``gradient``. Nothing is added by atomics: every sum has its owner.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import kept_weights, product, weighted_sum
from .rows import (
    ORDER_BLOCK,
    SIZES,
    Dropout,
    are_attended,
    attended_keys,
    find_tile,
    first_row,
    mask_from,
    sequence_rows,
    write_order,
)

OWN_SIZES = ["query_tiles", "sequences", "score_columns", "dweight_rows", "dweight_columns"]


class Pairs(NamedTuple):
    """The queries and keys of a sequence and head; pointers are of the first of them."""

    queries: tl.tensor  # how many
    keys: tl.tensor  # how many are attended, those of the mask aside
    mask_ptr: tl.tensor | None
    value_ptr: tl.tensor
    stride_vt: tl.tensor
    scores_ptr: tl.tensor
    stride_query: tl.tensor
    stride_key: tl.tensor
    stats_ptr: tl.tensor | None  # (max, sum) of each query; without them the scores are weights
    stride_stats: tl.tensor
    dcontext_ptr: tl.tensor | None
    stride_ct: tl.tensor
    dropout: Dropout | None
    sequence: tl.tensor
    head: tl.tensor


@triton.jit
def kept_of(pairs, query, key):
    return kept_weights(pairs.dropout, pairs.sequence, pairs.head, query[:, None], key[None, :])


@triton.jit
def attended_of(pairs, key):
    return are_attended(pairs.mask_ptr, key, pairs.keys)


@triton.jit
def load_softmax(pairs, query, key, attended):
    """``exp(score - max) / sum`` [queries, keys], 0 where there is no query or attended key."""
    are_queries = query < pairs.queries
    mask = are_queries[:, None] & attended[None, :]
    places = query[:, None] * pairs.stride_query + key[None, :] * pairs.stride_key
    scores = tl.load(pairs.scores_ptr + places, mask=mask, other=0.0)
    if pairs.stats_ptr is None:
        return scores
    else:
        stats = pairs.stats_ptr + query * pairs.stride_stats
        largest = tl.load(stats, mask=are_queries, other=0.0)
        total = tl.load(stats + 1, mask=are_queries, other=1.0)
        total = tl.where(total == 0.0, 1.0, total)
        weights = tl.exp(tl.where(mask, scores - largest[:, None], -float("inf")))
        return weights / total[:, None]


@triton.jit
def context_products(pairs, query, key, attended, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """``dcontext_i . value_j``, [queries, keys]."""
    dcontext_rows = pairs.dcontext_ptr + tl.minimum(query, pairs.queries - 1) * pairs.stride_ct
    products = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    for begin in range(0, DV, BLOCK_DV):
        d = begin + tl.arange(0, BLOCK_DV)
        dcontext = tl.load(dcontext_rows[:, None] + d[None, :], mask=d[None, :] < DV, other=0.0)
        value = tl.load(
            pairs.value_ptr + key[None, :] * pairs.stride_vt + d[:, None],
            mask=attended[None, :] & (d[:, None] < DV),
            other=0.0,
        )
        products += product(dcontext, value)
    return products


@triton.jit
def value_weights(pairs, query, key, attended):
    """The weights after dropout [keys, queries], 0 for queries past the last."""
    weights = load_softmax(pairs, query, key, attended)
    return tl.trans(weights * kept_of(pairs, query, key))


@triton.jit
def value_sums(pairs, weights, query, queries, d, DV: tl.constexpr):
    """``sum_i w_ij dcontext_i`` [keys, features] of the queries and features of these numbers, as
    far as they are among the first ``queries``."""
    mask = (query < queries)[:, None] & (d < DV)[None, :]
    places = d[None, :] + query[:, None] * pairs.stride_ct
    return weighted_sum(weights, tl.load(pairs.dcontext_ptr + places, mask=mask, other=0.0))


@triton.jit(do_not_specialize=[*SIZES, *OWN_SIZES])
def additive_attention_bwd_scores_kernel(
    inputs,  # :class:`rows.Inputs`
    dcontext,  # :class:`rows.Rows`, or None
    dweights_ptr,  # [batch, H, dweight_rows, dweight_columns], or None
    stats_ptr,  # [all queries, H, 2], (max, sum), or None
    scores_ptr,  # [all queries, H, score_columns], or without columns [max_q, all keys, H]
    dproducts_ptr,
    dscores_ptr,  # [all queries, H, stride_dscores], or None
    dvalue_ptr,  # [all keys, H, DV], or None
    order_ptr,
    batch,
    rows_q,
    rows_k,
    max_seqlen_q,
    max_seqlen_k,
    query_tiles,
    sequences,
    score_columns,
    dweight_rows,
    dweight_columns,
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
    at a time, with SINGLE_Q all of a sequence. Score gradients go to [rows, H, stride_dscores], for
    all keys of whole tiles of BLOCK_K, 0 where not attended. ``dproducts`` is the same memory as
    float32, where ``g`` is until a query's sum is known. Without ``stats`` the gradients of scores
    are ``dweights``, or ``scores`` are the weights after dropout. ``order`` is for the gradient
    pass: the sequences, those with most pairs first.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    cu_q_ptr = inputs.cu_q_ptr
    key_side = inputs.key_side
    cu_k_ptr = key_side.cu_ptr
    if tile < query_tiles:
        sequence, first = find_tile(cu_q_ptr, tile, batch, rows_q, BLOCK_Q)
        if order_ptr is not None:
            if (first == 0) & (head == 0):
                sizes = batch, rows_q, rows_k, max_seqlen_k
                places = order_ptr, sequence, sequences, sequences
                write_order(*places, cu_q_ptr, key_side, sizes, 0, ORDER_BLOCK)
    else:
        sequence, first = find_tile(cu_k_ptr, tile - query_tiles, batch, rows_k, BLOCK_K)
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    key_place, key_start, extent = sequence_rows(cu_k_ptr, sequence, batch, rows_k)
    _, _, length = attended_keys(key_side, sequence, batch, rows_k, max_seqlen_k)
    row = place * rows_q + start
    key_row = key_place * rows_k + key_start
    scores_item = scores_ptr
    stride_query = 0
    stride_key = 0
    if score_columns is not None:
        scores_item += (row * H + head) * score_columns
        stride_query = score_columns * H
        stride_key = 1
    elif scores_ptr is not None:
        scores_item += key_row * H + head
        stride_query = rows_k * H
        if cu_k_ptr is None:
            stride_query *= batch
        stride_key = H
    dcontext_item = None
    stride_ct = 0
    if dcontext is not None:
        stride_ct = dcontext.by_row
        dcontext_item = first_row(dcontext, place, start, head)
    pairs = Pairs(
        length_q,
        length,
        mask_from(key_side, key_place * rows_k),
        first_row(inputs.value, key_place, key_start, head),
        inputs.value.by_row,
        scores_item,
        stride_query,
        stride_key,
        None if stats_ptr is None else stats_ptr + (row * H + head) * 2,
        H * 2,
        dcontext_item,
        stride_ct,
        inputs.dropout,
        sequence,
        head,
    )
    if dscores_ptr is not None:
        if tile < query_tiles:
            query = first + tl.arange(0, BLOCK_Q)
            are_queries = (query < length_q)[:, None]
            column = tl.arange(0, BLOCK_K).to(tl.int64)
            query_row = (((row + query) * H + head) * stride_dscores)[:, None]
            keys = tl.where(first < length_q, length, 0)
            delta = tl.zeros((BLOCK_Q,), tl.float32)
            sum_of_weights = tl.zeros((BLOCK_Q,), tl.float32)
            for begin in range(0, keys, BLOCK_K):
                key = begin + column
                attended = attended_of(pairs, key)
                gradient = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                if dcontext is not None:
                    gradient += context_products(pairs, query, key, attended, DV, BLOCK_DV)
                if dweights_ptr is not None:
                    mask = (query < tl.minimum(length_q, max_seqlen_q))[:, None]
                    dweight_row = (sequence.to(tl.int64) * H + head) * dweight_rows + query
                    gradient += tl.load(
                        dweights_ptr + dweight_row[:, None] * dweight_columns + key[None, :],
                        mask=mask & attended[None, :],
                        other=0.0,
                    ).to(tl.float32)
                gradient *= kept_of(pairs, query, key)
                if stats_ptr is not None:
                    weights = load_softmax(pairs, query, key, attended)
                    delta += tl.sum(weights * gradient, 1)
                    sum_of_weights += tl.sum(weights, 1)
                tl.store(dproducts_ptr + query_row + key[None, :], gradient, mask=are_queries)
            if stats_ptr is not None:
                # Rounded weights need not sum to 1, but score gradients to 0.
                delta = delta / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
                WIDTH: tl.constexpr = 32 // dscores_ptr.dtype.element_ty.primitive_bitwidth
                tl.debug_barrier()  # other threads may have written what comes back here
                for begin in range(0, keys, BLOCK_K):
                    key = begin + column
                    weights = load_softmax(pairs, query, key, attended_of(pairs, key))
                    products = dproducts_ptr + query_row + key[None, :]
                    gradient = tl.load(products, mask=are_queries, other=0.0)
                    dscores = weights * (gradient - delta[:, None])
                    # Those of 16 bits lie where others read: of this tile, or one before it.
                    tl.debug_barrier()
                    tl.store(
                        dscores_ptr + query_row * WIDTH + key[None, :],
                        dscores.to(dscores_ptr.dtype.element_ty),
                        mask=are_queries,
                    )
    if dvalue_ptr is not None:
        if tile >= query_tiles:
            key = first + tl.arange(0, BLOCK_K)
            attended = attended_of(pairs, key)
            line = tl.arange(0, SEGMENT_Q).to(tl.int64)
            # Without attended keys none is read, not even to be multiplied by 0: what comes in for
            # rows of nobody may be NaN.
            queries = tl.where(first < length, length_q, 0)
            if SINGLE_Q:
                weights = value_weights(pairs, line, key, attended)
            dvalue_rows = dvalue_ptr + ((key_row + key) * H + head) * DV
            for begin_d in range(0, tl.where(first < extent, DV, 0), BLOCK_DV):
                d = begin_d + tl.arange(0, BLOCK_DV)
                if SINGLE_Q:
                    sums = value_sums(pairs, weights, line, queries, d, DV)
                else:
                    sums = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
                    for begin in range(0, queries, SEGMENT_Q):
                        weights = value_weights(pairs, begin + line, key, attended)
                        sums += value_sums(pairs, weights, begin + line, queries, d, DV)
                tl.store(
                    dvalue_rows[:, None] + d[None, :],
                    sums.to(dvalue_ptr.dtype.element_ty),
                    mask=(key < extent)[:, None] & (d < DV)[None, :],
                )
