"""Backward for several queries a sequence: weights and score gradients, then what they multiply.

With ``s_ij`` the gradient of the score, ``w'`` the weights after dropout and
``h = 1 / (1 + A B) - 1/2``, so that ``tanh = -2 h``:

    dvalue_j = sum_i w'_ij dcontext_i           dquery_id = 4 w_d sum_j s_ij (1/4 - h^2)
    dscore_weight_d = -2 sum_ij s_ij h          dkey_jd = 4 w_d sum_i s_ij (1/4 - h^2)

Nothing is added by atomics: every sum has its owner.
"""

import triton
import triton.language as tl

from .arithmetic import dropout_scales, product, weighted_sum
from .rows import are_attended, attended_keys, find_tile, sequence_rows
from .scores import write_bounds, write_scores

SIZES = ["batch", "rows_q", "rows_k", "max_seqlen_q", "max_seqlen_k", "threshold"]
# They follow the longest sequences, and what autograd made of the gradient.
DWEIGHT_STRIDES = [f"stride_dweight_{axis}" for axis in ("b", "key_row", "query", "key", "head")]


@triton.jit(do_not_specialize=SIZES + DWEIGHT_STRIDES)
def additive_attention_bwd_scores_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    score_weight_ptr,
    dcontext_ptr,
    dweights_ptr,
    stats_ptr,
    weights_ptr,
    dscores_ptr,
    query_bound_ptr,
    key_bound_ptr,
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
    stride_cb,
    stride_ct,
    stride_ch,
    stride_wh,
    stride_dweight_b,
    stride_dweight_key_row,
    stride_dweight_query,
    stride_dweight_key,
    stride_dweight_head,
    stride_scores,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Weights after dropout and ``s_ij = w_ij (g_ij - sum_j w_ij g_ij)`` of BLOCK_Q queries.

    ``g_ij = (dcontext_i . value_j + dweights_ij) (dropout's scale)``. Both go to float32
    [rows, H, stride_scores], for all keys of whole tiles of BLOCK_K, 0 where not attended.
    The bounds of rows by which the gradient pass chooses its route go to [rows, H].
    Without ``stats`` (and ``weights``), ``dweights`` are the gradients of the scores.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    sequence, first_query = find_tile(cu_q_ptr, tl.program_id(0), batch, rows_q, BLOCK_Q)
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    key_place, key_start, length = attended_keys(
        cu_k_ptr, key_lengths_ptr, sequence, batch, rows_k, max_seqlen_k
    )
    if (first_query >= length_q) | (length == 0):
        return
    query = first_query + tl.arange(0, BLOCK_Q)
    query_valid = query < length_q
    safe_query = start + tl.minimum(query, length_q - 1)
    row = (place * rows_q + start + query) * H + head
    first_row = (place * rows_q + start) * H + head
    key_row = key_place * rows_k + key_start
    value_rows_ptr = value_ptr + key_place * stride_vb + key_start * stride_vt + head * stride_vh
    query_item = query_ptr + place * stride_qb + start * stride_qt + head * stride_qh
    key_item = key_ptr + key_place * stride_kb + key_start * stride_kt + head * stride_kh
    if stats_ptr is None:
        write_bounds(
            query_item,
            stride_qt,
            first_query,
            length_q,
            key_item,
            stride_kt,
            length,
            score_weight_ptr + head * stride_wh,
            query_bound_ptr + first_row,
            key_bound_ptr + key_row * H + head,
            H,
            D,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
            USE_PTX,
        )
    else:
        for half in tl.static_range(2):
            if (length_q - first_query <= BLOCK_Q // 2) == half:
                write_scores(
                    query_item,
                    stride_qt,
                    first_query,
                    length_q,
                    key_item,
                    stride_kt,
                    0,
                    length,
                    length,
                    score_weight_ptr + head * stride_wh,
                    weights_ptr + first_row * stride_scores,
                    H * stride_scores,
                    query_bound_ptr + first_row,
                    key_bound_ptr + key_row * H + head,
                    H,
                    D,
                    BLOCK_Q >> half,
                    BLOCK_K,
                    BLOCK_D << half,
                    False,
                    REFINE,
                    USE_PTX,
                )
        tl.debug_barrier()  # other threads of the program read what these have written

    column = tl.arange(0, BLOCK_K).to(tl.int64)
    if stats_ptr is not None:
        largest = tl.load(stats_ptr + row * 2, mask=query_valid, other=0.0)
        total = tl.load(stats_ptr + row * 2 + 1, mask=query_valid, other=1.0)
        total = tl.where(total == 0.0, 1.0, total)
    delta = tl.zeros((BLOCK_Q,), tl.float32)
    sum_of_weights = tl.zeros((BLOCK_Q,), tl.float32)
    for first in range(0, length, BLOCK_K):
        position = first + column
        attended = are_attended(padding_mask_ptr, key_place, rows_k, position, length)
        mask = query_valid[:, None] & attended[None, :]
        places = row[:, None] * stride_scores + position[None, :]
        if stats_ptr is not None:
            scores = tl.load(weights_ptr + places, mask=mask, other=0.0)
            weights = tl.exp(tl.where(mask, scores - largest[:, None], -float("inf")))
            weights = weights / total[:, None]
        gradient = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        if dcontext_ptr is not None:
            dcontext_rows = (
                dcontext_ptr + place * stride_cb + safe_query * stride_ct + head * stride_ch
            )
            for begin in range(0, DV, BLOCK_DV):
                d = begin + tl.arange(0, BLOCK_DV)
                dcontext = tl.load(
                    dcontext_rows[:, None] + d[None, :], mask=d[None, :] < DV, other=0.0
                )
                value = tl.load(
                    value_rows_ptr + position[None, :] * stride_vt + d[:, None],
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
                + position[None, :] * stride_dweight_key,
                mask=mask & (query < max_seqlen_q)[:, None],
                other=0.0,
            ).to(tl.float32)
        if seed_ptr is not None:
            gradient *= dropout_scales(
                seed_ptr,
                threshold,
                dropout_scale,
                sequence,
                head,
                query[:, None],
                position[None, :],
            )
        if stats_ptr is not None:
            delta += tl.sum(weights * gradient, 1)
            sum_of_weights += tl.sum(weights, 1)
            tl.debug_barrier()  # all scores have been read before they are replaced
            tl.store(weights_ptr + places, weights, mask=query_valid[:, None])
        tl.store(dscores_ptr + places, gradient, mask=query_valid[:, None])
    if stats_ptr is not None:
        # Rounded weights need not sum to 1, but score gradients to 0.
        delta = delta / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
        tl.debug_barrier()  # other threads of the program may have written what comes back here
        for first in range(0, length, BLOCK_K):
            position = first + column
            places = row[:, None] * stride_scores + position[None, :]
            weights = tl.load(weights_ptr + places, mask=query_valid[:, None], other=0.0)
            gradient = tl.load(dscores_ptr + places, mask=query_valid[:, None], other=0.0)
            dscores = weights * (gradient - delta[:, None])
            tl.debug_barrier()  # all has been read before it is replaced
            tl.store(dscores_ptr + places, dscores, mask=query_valid[:, None])
            if seed_ptr is not None:
                weights *= dropout_scales(
                    seed_ptr,
                    threshold,
                    dropout_scale,
                    sequence,
                    head,
                    query[:, None],
                    position[None, :],
                )
                tl.store(weights_ptr + places, weights, mask=query_valid[:, None])


@triton.jit(do_not_specialize=["batch", "rows_q", "rows_k", "max_seqlen_k"])
def additive_attention_dvalue_kernel(
    weights_ptr,
    dcontext_ptr,
    dvalue_ptr,
    cu_q_ptr,
    cu_k_ptr,
    key_lengths_ptr,
    batch,
    rows_q,
    rows_k,
    max_seqlen_k,
    stride_cb,
    stride_ct,
    stride_ch,
    stride_weight_query_row,
    stride_weight_key_row,
    stride_weight_query,
    stride_weight_key,
    stride_weight_head,
    H: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``dvalue_j = sum_i w'_ij dcontext_i`` for BLOCK_K keys, a head and BLOCK_DV features.

    ``weights`` are addressed as in ``additive_attention_weights_kernel``; rows that belong to
    nobody or are not attended get 0.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    sequence, first_key = find_tile(cu_k_ptr, tl.program_id(0), batch, rows_k, BLOCK_K)
    key_place, key_start, extent = sequence_rows(cu_k_ptr, sequence, batch, rows_k)
    _, _, length = attended_keys(cu_k_ptr, key_lengths_ptr, sequence, batch, rows_k, max_seqlen_k)
    if first_key >= extent:
        return
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    if first_key >= length:
        length_q = length_q * 0
    key = first_key + tl.arange(0, BLOCK_K)
    d = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    weights_rows = (
        weights_ptr
        + (place * rows_q + start) * stride_weight_query_row
        + (key_place * rows_k + key_start) * stride_weight_key_row
        + head * stride_weight_head
    )
    dcontext_rows = dcontext_ptr + place * stride_cb + start * stride_ct + head * stride_ch
    sums = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    for begin in range(0, length_q, BLOCK_Q):
        query = begin + tl.arange(0, BLOCK_Q)
        weights = tl.load(
            weights_rows + query[None, :] * stride_weight_query + key[:, None] * stride_weight_key,
            mask=(query < length_q)[None, :] & (key < length)[:, None],
            other=0.0,
        )
        dcontext = tl.load(
            dcontext_rows + query[:, None] * stride_ct + d[None, :],
            mask=(query < length_q)[:, None] & (d < DV)[None, :],
            other=0.0,
        )
        sums += weighted_sum(weights, dcontext)
    row = (key_place * rows_k + key_start + key) * H + head
    tl.store(
        dvalue_ptr + row[:, None] * DV + d[None, :],
        sums.to(dvalue_ptr.dtype.element_ty),
        mask=(key < extent)[:, None] & (d < DV)[None, :],
    )
