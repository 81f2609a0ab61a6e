"""Pooling: softmax over keys that are scored without a query; the counterpart of ``step``.

Bound by memory: keys, gates and values are read once, but for more than POOL_BRANCHES branches.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configurations
from .forward import additive_attention_weights_kernel, merge_parts_kernel
from .hidden import (
    SIZES,
    Dropout,
    add_products,
    describe_pool,
    feature_dropout,
    first_branch,
    gate_rows,
    hidden_and_slopes,
    kept_weights,
    key_tile,
    rows_of_tile,
    strides_of_gate,
    zeros_of_branches,
)
from .problem import (
    DENSE_WEIGHTS,
    JAGGED_WEIGHTS,
    RAW,
    Problem,
    alignment,
    on_device,
    rows_of,
    strides_of,
    uses_ptx,
)
from .step import STAGES, load_tile


@triton.jit(do_not_specialize=SIZES)
def additive_pool_fwd_kernel(
    key_ptr,  # [places, rows_k, H, D]
    gate_ptr,  # the same, or None
    value_ptr,  # [places, rows_k, H, DV]
    score_weight_ptr,  # [H, K, D]
    context_ptr,  # [batch, K, H, DV]; not SINGLE: float32 [tiles, K, H, DV]
    stats_ptr,  # [batch or tiles, K, H, 2], (max, sum); None: scores are all that is wanted
    scores_ptr,  # [all rows, H, K], or None
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    feature_seed_ptr,
    batch,
    rows_k,
    max_seqlen_k,
    threshold,
    dropout_scale,
    tanh_threshold,
    tanh_scale,
    gate_threshold,
    gate_scale,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_vb,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINGLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """``context_k = sum_j softmax_j(e_kj) value_j``.

    With ``SINGLE`` a tile holds all keys of its sequence, else the sums of its keys, unscaled, are
    left for :func:`merge_parts_kernel`.
    """
    tile = key_tile(
        cu_k_ptr, key_lengths_ptr, padding_mask_ptr, batch, rows_k, max_seqlen_k, SEGMENT
    )
    if (tile.sequence >= batch) | (SINGLE & (tile.first > 0)):
        return
    branch = first_branch(GROUP, K)
    keys = rows_of_tile(key_ptr, tile, stride_kb, stride_kt, stride_kh, ALIGNMENT)
    gates = gate_ptr
    if gate_ptr is not None:
        gates = rows_of_tile(gate_ptr, tile, stride_gb, stride_gt, stride_gh, ALIGNMENT)
    score_weights_ptr = score_weight_ptr + tile.head * (K * D)
    scores = zeros_of_branches(GROUP, SEGMENT)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        hidden, _, _ = hidden_and_slopes(
            keys,
            gates,
            tile,
            Dropout(feature_seed_ptr, tanh_threshold, tanh_scale),
            Dropout(feature_seed_ptr, gate_threshold, gate_scale),
            begin,
            D,
            BLOCK_D,
            USE_PTX,
        )
        d = begin + tl.arange(0, BLOCK_D)
        scores = add_products(scores, hidden, score_weights_ptr, D, branch, d, GROUP, K, D)
    if scores_ptr is not None:
        entries = scores_ptr + (tile.row * H + tile.head) * K + branch
        for i in tl.static_range(GROUP):
            if branch + i < K:
                tl.store(entries + i, scores[i], mask=tile.attended)
    if stats_ptr is not None:
        target = (tile.sequence if SINGLE else tl.program_id(0)).to(tl.int64) * (K * H) + tile.head
        weights = ()
        for i in tl.static_range(GROUP):
            score = tl.where(tile.attended, scores[i], -float("inf"))
            largest = tl.max(score, 0)
            weight = tl.exp(score - tl.where(largest == -float("inf"), 0.0, largest))
            total = tl.sum(weight, 0)
            stats_row = stats_ptr + (target + (branch + i) * H) * 2
            if branch + i < K:
                tl.store(stats_row, largest)
                tl.store(stats_row + 1, total)
            if SINGLE:
                weight = weight / tl.where(total == 0.0, 1.0, total)
            weight *= kept_weights(seed_ptr, threshold, dropout_scale, tile, branch + i)
            weights += (weight,)
        values = rows_of_tile(value_ptr, tile, stride_vb, stride_vt, stride_vh, ALIGNMENT)
        for begin in tl.range(0, DV, BLOCK_DV, num_stages=STAGES):
            d = begin + tl.arange(0, BLOCK_DV)
            value = load_tile(values, tile.attended, d, DV)
            for i in tl.static_range(GROUP):
                if branch + i < K:
                    context = tl.sum(weights[i][:, None] * value, 0)
                    context_row = context_ptr + (target + (branch + i) * H) * DV
                    tl.store(context_row + d, context.to(context_ptr.dtype.element_ty), mask=d < DV)


def launch_forward(
    problem: Problem,
    inputs: tuple,
    features: tuple,
    context: Tensor | None,
    stats: Tensor | None,
    scores: Tensor | None,
) -> None:
    """Fill context and stats, if any, and scores [all rows, H, K], if any.

    Args:
        inputs: key, value, score_weight, and gate or None, with features next to each other.
        features: of :func:`feature_dropout`.
    """
    key, value, score_weight, gate = inputs
    heads, branches = problem.heads, problem.rows_q
    segment = configurations.pool_segment(problem.max_k)
    single, config = problem.max_k <= segment, configurations.POOL
    tiles = problem.tiles("k", segment)
    group = configurations.pool_group(branches)
    merges = not single and stats is not None
    partial, part_stats = context, stats
    if merges:
        shape = (tiles, branches, heads)
        partial = key.new_empty((*shape, problem.value_dim), dtype=torch.float32)
        part_stats = key.new_empty((*shape, 2), dtype=torch.float32)
    seed, *thresholds = features
    additive_pool_fwd_kernel[(tiles, heads, triton.cdiv(branches, group))](
        key,
        gate,
        value,
        score_weight,
        partial,
        part_stats,
        scores,
        *problem.key_side(),
        problem.seed,
        seed,
        problem.batch,
        problem.rows_k,
        problem.max_k,
        *problem.dropout(),
        *thresholds,
        *strides_of(key, problem.cu_k),
        *strides_of_gate(gate, problem.cu_k),
        *strides_of(value, problem.cu_k),
        H=heads,
        K=branches,
        D=problem.dim,
        DV=problem.value_dim,
        SEGMENT=segment,
        GROUP=group,
        BLOCK_D=config.features,
        BLOCK_DV=config.value_features,
        SINGLE=single,
        ALIGNMENT=alignment(key, gate, value, score_weight),
        USE_PTX=uses_ptx(key),
        num_warps=config.warps,
    )
    if merges:
        parts = triton.cdiv(problem.rows_k, segment)
        merge_parts_kernel[(problem.batch, branches * heads)](
            partial,
            part_stats,
            context,
            stats,
            problem.cu_k,
            problem.rows_k,
            parts,
            parts,
            1,
            H=branches * heads,
            DV=problem.value_dim,
            BLOCK_DV=configurations.MERGE.value_features,
            TILE=segment,
            num_warps=configurations.MERGE.warps,
        )


def _launch_weights(problem: Problem, scores: Tensor, stats: Tensor, weights: Tensor) -> None:
    """Fill weights: [B, H, K, Nk], or of jagged keys [Nk, H, K]."""
    heads, branches = problem.heads, problem.rows_q
    config = configurations.WEIGHTS
    programs = problem.tiles("k", config.keys) * triton.cdiv(branches, config.queries)
    strides = weights.stride()
    if problem.cu_k is None:
        by_sequence, by_head, by_branch, by_key = strides
        strides = (by_sequence, 0, by_branch, by_key, by_head)
    else:
        by_key, by_head, by_branch = strides
        strides = (0, by_key, by_branch, by_key, by_head)
    additive_attention_weights_kernel[(programs, heads)](
        scores,
        stats,
        weights,
        None,
        *problem.key_side(),
        problem.seed,
        problem.batch,
        branches,
        problem.rows_k,
        branches,
        problem.max_k,
        *problem.dropout(),
        *(0, heads * branches, 1, heads * branches, branches),  # of scores
        *strides,
        H=heads,
        BLOCK_Q=config.queries,
        BLOCK_K=config.keys,
        num_warps=config.warps,
    )


def additive_pool_forward(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    gate: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_k: int,
    tanh_dropout_p: float,
    gate_dropout_p: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights_layout: int,
    keep_scores: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = (cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_k)
    problem = describe_pool(key, value, score_weight, *layout, dropout_p, dropout_seed)
    raw, weights_layout = divmod(weights_layout, RAW)
    batch, branches, heads = problem.batch, problem.rows_q, problem.heads
    context = value.new_empty((batch, branches, heads, problem.value_dim))
    stats = key.new_empty((batch, branches, heads, 2), dtype=torch.float32)
    is_empty = problem.all_rows_k == 0 or stats.numel() == 0
    if raw or is_empty:
        context.zero_()
        stats.zero_()
    scores = stats.new_empty((0,))
    if raw or keep_scores or weights_layout:
        scores = stats.new_empty((*key.shape[:3], branches))
    weights = value.new_zeros(
        {
            0: (0,),
            DENSE_WEIGHTS: (batch, heads, branches, problem.rows_k),
            JAGGED_WEIGHTS: (problem.rows_k, heads, branches),
        }[weights_layout if not raw else 0]
    )
    if raw:
        scores.fill_(-math.inf)
    if not is_empty:
        inputs = rows_of(key), rows_of(value), score_weight.contiguous(), gate_rows(gate)
        features = feature_dropout(dropout_seed, tanh_dropout_p, gate_dropout_p)
        softmax = (None, None) if raw else (context, stats)
        with on_device(key):
            launch_forward(problem, inputs, features, *softmax, scores if scores.numel() else None)
            if weights.numel():
                _launch_weights(problem, scores, stats, weights)
    if raw:
        weights = scores.permute(0, 2, 3, 1).contiguous()
        if weights_layout == JAGGED_WEIGHTS:
            weights = scores.squeeze(0)
    return context, weights, stats, scores if keep_scores else stats.new_empty((0,))
