"""Returned attention weights, from scores and the stats of their softmaxes."""

import triton
import triton.language as tl
from torch import Tensor

from . import configurations
from .arithmetic import kept_weights
from .problem import Problem
from .rows import SIZES, are_attended, attended_keys, find_tile, mask_from, sequence_rows

COLUMNS = ["score_columns", "weight_rows", "weight_columns"]


@triton.jit(do_not_specialize=SIZES + COLUMNS)
def additive_attention_weights_kernel(
    scores_ptr,  # [all queries, H, score_columns], or without columns [all keys, H, rows_q]
    stats_ptr,  # [all queries, H, 2], (max, sum); None: scores are what is returned
    weights_ptr,  # [batch, H, weight_rows, weight_columns], or without [all keys, H, rows_q]
    cu_q_ptr,
    key_side,  # :class:`rows.KeySide`
    dropout,  # :class:`rows.Dropout`, or None
    batch,
    rows_q,
    rows_k,
    max_seqlen_q,
    max_seqlen_k,
    score_columns,
    weight_rows,
    weight_columns,
    H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``exp(score - max) / sum``, dropped out, of pairs that attend; the rest is not touched."""
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    # Of the axes of a grid only the first holds more than 65,535.
    query_tiles = tl.cdiv(max_seqlen_q, BLOCK_Q)
    tile = tl.program_id(0) // query_tiles
    first_query = (tl.program_id(0) % query_tiles).to(tl.int64) * BLOCK_Q
    sequence, first_key = find_tile(key_side.cu_ptr, tile, batch, rows_k, BLOCK_K)
    if sequence >= batch:
        return
    key_place, key_start, length = attended_keys(key_side, sequence, batch, rows_k, max_seqlen_k)
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    length_q = tl.minimum(length_q, max_seqlen_q)
    query = first_query + tl.arange(0, BLOCK_Q)
    key = first_key + tl.arange(0, BLOCK_K)
    attended = are_attended(mask_from(key_side, key_place * rows_k), key, length)
    mask = (query < length_q)[:, None] & attended[None, :]
    query_row = ((place * rows_q + start + query) * H + head)[:, None]
    key_row = ((key_place * rows_k + key_start + key) * H + head)[None, :]
    by_key = key_row * rows_q + query[:, None]
    score = by_key
    if score_columns is not None:
        score = query_row * score_columns + key[None, :]
    weights = tl.load(scores_ptr + score, mask=mask, other=0.0)
    if stats_ptr is not None:
        largest = tl.load(stats_ptr + query_row * 2, mask=(query < length_q)[:, None], other=0.0)
        total = tl.load(stats_ptr + query_row * 2 + 1, mask=(query < length_q)[:, None], other=1.0)
        weights = tl.exp(weights - largest) / total
    weights *= kept_weights(dropout, sequence, head, query[:, None], key[None, :])
    target = by_key
    if weight_columns is not None:
        row = (sequence.to(tl.int64) * H + head) * weight_rows + query
        target = row[:, None] * weight_columns + key[None, :]
    tl.store(weights_ptr + target, weights.to(weights_ptr.dtype.element_ty), mask=mask)


def fill_weights(
    problem: Problem,
    scores: Tensor,
    score_columns: int | None,
    stats: Tensor | None,
    weights: Tensor,
) -> None:
    """Fill what attends of the weights, [B, H, .., ..] or [all keys, H, ..]; as the kernel says."""
    tiles = configurations.WEIGHTS
    programs = problem.tiles("k", tiles.keys) * triton.cdiv(problem.max_q, tiles.queries)
    additive_attention_weights_kernel[(programs, problem.heads)](
        scores,
        stats,
        weights,
        problem.cu_q,
        problem.inputs.key_side,
        problem.inputs.dropout,
        *problem.sizes,
        score_columns,
        *(weights.shape[2:] if weights.dim() == 4 else (None, None)),
        H=problem.heads,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        num_warps=tiles.warps,
    )
