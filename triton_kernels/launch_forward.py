"""Launchers of the forward kernels."""

import math

import torch
import triton
from torch import Tensor

from . import configurations
from .forward import additive_attention_fwd_kernel
from .problem import (
    DENSE_WEIGHTS,
    JAGGED_WEIGHTS,
    RAW,
    Problem,
    check_workspace,
    describe,
    on_device,
    processors,
    register_limit,
)
from .rows import ORDER_BLOCK, order_kernel
from .scores import Shape
from .step import step_forward
from .sums import merge_parts
from .weights import fill_weights

PROGRAMS_A_PROCESSOR = 4  # enough for every processor to be busy to the end
MOST_PARTS = 64


def additive_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    exp_key: Tensor | None,
    key_bound: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights_layout: int,
    keep_scores: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw, weights_layout = divmod(weights_layout, RAW)
    weighted = key[..., :0] if raw else value
    layout = cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k
    problem = describe(query, key, weighted, score_weight, *layout, dropout_p, dropout_seed)
    rows = query.shape[:3]
    context = value.new_empty((*rows, value.size(3)))
    stats = query.new_empty((*rows, 2), dtype=torch.float32)
    kept_shape = key.shape[:3] if problem.is_one_step else (*rows, max_seqlen_k)
    kept = stats.new_empty(kept_shape if keep_scores else (0,))
    weights_shape = {
        0: (0,),
        DENSE_WEIGHTS: (problem.batch, problem.heads, max_seqlen_q, max_seqlen_k),
        JAGGED_WEIGHTS: (problem.rows_k, problem.heads),
    }[weights_layout]
    absent, dtype = (-math.inf, torch.float32) if raw else (0.0, value.dtype)
    weights = value.new_full(weights_shape, absent, dtype=dtype)
    is_empty = problem.has_no_keys or (context.numel() == 0 and weights.numel() == 0)
    softmax: tuple[Tensor | None, Tensor | None] = (context, stats)
    if raw or is_empty:
        context.zero_()
        stats.zero_()
        softmax = None, None
    if is_empty:
        return context, weights, stats, kept
    with on_device(query):
        if problem.is_one_step:
            # Its scores need not be copied where they lie as they are returned.
            by_key = weights_layout == JAGGED_WEIGHTS
            by_key = by_key or (problem.heads == 1 and problem.cu_k is None)
            scores = kept if keep_scores else None
            if raw and by_key:
                scores = weights
            elif weights_layout and scores is None:
                shape = problem.all_rows_k, problem.heads
                scores = query.new_empty(shape, dtype=torch.float32)
            step_forward(problem, *softmax, scores)
        else:
            scores = kept if keep_scores else None
            if weights_layout and not keep_scores:
                scores = _room_for_scores(problem)
            _forward(problem, *softmax, scores, raw)
        if weights_layout and weights.numel() and scores is not weights:
            columns = None if problem.is_one_step else scores.size(-1)
            fill_weights(problem, scores, columns, softmax[1], weights)
    return context, weights, stats, kept


def _room_for_scores(problem: Problem) -> Tensor:
    shape = (problem.all_rows_q, problem.heads, problem.max_k)
    check_workspace(problem, math.prod(shape))
    return problem.inputs.key.ptr.new_empty(shape, dtype=torch.float32)


def score_pairs(problem: Problem) -> Tensor:
    """The scores [rows, H, max_k] that forward computed and did not keep."""
    scores = _room_for_scores(problem)
    _forward(problem, None, None, scores, False)
    return scores


def _forward(
    problem: Problem,
    context: Tensor | None,
    stats: Tensor | None,
    kept: Tensor | None,
    raw: bool,
) -> None:
    """Fill context and stats, if any, and ``kept``, all scores [.., H, columns], if any.

    ``raw``: the scores are returned; only their differences matter to a softmax.
    """
    query, value = problem.inputs.query.ptr, problem.inputs.value.ptr
    heads, rows_q = problem.heads, problem.all_rows_q
    tiles = configurations.score_tiles(
        rows_q * heads, processors(query), problem.dim, problem.value_dim, value.dtype
    )
    segment = configurations.segment(problem.max_k)
    single = problem.max_k <= segment
    grid_tiles = problem.tiles("q", tiles.queries)
    parts = 1
    if not single:
        wanted = PROGRAMS_A_PROCESSOR * processors(query) // max(1, grid_tiles * heads)
        parts = min(MOST_PARTS, max(1, wanted), triton.cdiv(problem.max_k, segment))
    order = None
    if problem.is_ordered():
        order = query.new_empty((2 * grid_tiles + 1,), dtype=torch.int32)
        order_kernel[(problem.sequences(),)](
            order,
            problem.cu_q,
            problem.inputs.key_side,
            problem.sequences(),
            grid_tiles,
            *problem.sizes,
            TILE=tiles.queries,
            BLOCK=ORDER_BLOCK.value,
            num_warps=1,
        )
    scores = kept
    if scores is None:
        scores = query.new_empty((rows_q, parts, heads, segment), dtype=torch.float32)
    partial, part_stats = None, stats
    merges = not single and stats is not None
    if merges:
        partial = query.new_empty((rows_q, parts, heads, problem.value_dim), dtype=torch.float32)
        part_stats = query.new_empty((rows_q, parts, heads, 2), dtype=torch.float32)
    additive_attention_fwd_kernel[(grid_tiles, heads, parts)](
        problem.inputs,
        context,
        part_stats,
        partial,
        scores,
        order,
        *problem.sizes,
        parts,
        segment,
        grid_tiles,
        processors(query),
        scores.size(-1),
        Shape(
            heads,
            problem.dim,
            problem.value_dim,
            tiles.queries,
            tiles.keys,
            tiles.features,
            tiles.pairs,
            tiles.value_features,
            configurations.score_columns(value.dtype),
            single,
            kept is not None,
            raw,
            query.dtype == torch.float32,
            problem.uses_ptx,
        ),
        num_warps=tiles.warps,
        **register_limit(tiles),
    )
    if merges:
        merge_parts(partial, part_stats, context, stats, parts)
