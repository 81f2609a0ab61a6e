"""Forward over the keys of each sequence; see ``key_tiles``."""

import triton
import triton.language as tl
from torch import Tensor

from .key_scores import scores_of_tile
from .key_tiles import (
    SIZES,
    STAGES,
    Plan,
    first_branch,
    kept_keys,
    key_tile,
    load_tile,
    program_keys,
    rows_of,
)
from .problem import Problem
from .sums import merge_parts


@triton.jit
def attend(scores, branch, inputs, tile, context_ptr, stats_ptr, SHAPE: tl.constexpr):
    """Write contexts and stats of the GROUP branches from ``branch`` on."""
    GROUP: tl.constexpr = SHAPE.GROUP
    H: tl.constexpr = SHAPE.H
    K: tl.constexpr = SHAPE.K
    DV: tl.constexpr = SHAPE.DV
    target = (tile.sequence if SHAPE.SINGLE else tl.program_id(0)).to(tl.int64)
    target = (target * K + branch) * H + tile.head
    weights = ()
    for i in tl.static_range(GROUP):
        score = tl.where(tile.attended, scores[i], -float("inf"))
        largest = tl.max(score, 0)
        weight = tl.exp(score - tl.where(largest == -float("inf"), 0.0, largest))
        total = tl.sum(weight, 0)
        stats_row = stats_ptr + (target + i * H) * 2
        if branch + i < K:
            tl.store(stats_row, largest)
            tl.store(stats_row + 1, total)
        if SHAPE.SINGLE:
            weight = weight / tl.where(total == 0.0, 1.0, total)
        weights += (weight * kept_keys(inputs.dropout, tile, branch + i),)
    values = rows_of(inputs.value, tile, DV)
    for begin in tl.range(0, DV, SHAPE.BLOCK_DV, num_stages=STAGES):
        d = begin + tl.arange(0, SHAPE.BLOCK_DV)
        value = load_tile(values, tile.attended, d, DV)
        for i in tl.static_range(GROUP):
            if branch + i < K:
                context = tl.sum(weights[i][:, None] * value, 0)
                row = context_ptr + (target + i * H) * DV
                tl.store(row + d, context.to(row.dtype.element_ty), mask=d < DV)


@triton.jit
def forward_of_tile(inputs, keys, context_ptr, stats_ptr, scores_ptr, rows_k, SHAPE: tl.constexpr):
    """What the kernel writes for one tile."""
    GROUP: tl.constexpr = SHAPE.GROUP
    tile = key_tile(keys, inputs.key_side, rows_k, SHAPE)
    branch = first_branch(SHAPE)
    scores = scores_of_tile(inputs, tile, branch, SHAPE, stats_ptr is None)
    if scores_ptr is not None:
        entries = scores_ptr + tile.row * SHAPE.K + branch
        for i in tl.static_range(GROUP):
            if branch + i < SHAPE.K:
                tl.store(entries + i, scores[i], mask=tile.attended)
    if stats_ptr is not None:
        attend(scores, branch, inputs, tile, context_ptr, stats_ptr, SHAPE)


@triton.jit(do_not_specialize=SIZES)
def additive_attention_keys_fwd_kernel(
    inputs,  # :class:`rows.Inputs`
    context_ptr,  # [batch, K, H, DV]; not SINGLE: float32 [tiles, K, H, DV], yet to be scaled
    stats_ptr,  # [batch or tiles, K, H, 2], (max, sum); None: only scores are wanted
    scores_ptr,  # [all rows, H, K], or None
    batch,
    rows_k,
    max_seqlen_k,
    SHAPE: tl.constexpr,
    HALF: tl.constexpr,
):
    """``context_k = sum_j softmax_j(e_kj) value_j``."""
    keys = program_keys(inputs.key_side, batch, rows_k, max_seqlen_k, SHAPE.TILE)
    if (keys.sequence >= batch) | (SHAPE.SINGLE & (keys.first > 0)):
        return
    if HALF is None:
        forward_of_tile(inputs, keys, context_ptr, stats_ptr, scores_ptr, rows_k, SHAPE)
    elif keys.length - keys.first <= HALF.SEGMENT:
        forward_of_tile(inputs, keys, context_ptr, stats_ptr, scores_ptr, rows_k, HALF)
    else:
        forward_of_tile(inputs, keys, context_ptr, stats_ptr, scores_ptr, rows_k, SHAPE)


def forward_over_keys(
    problem: Problem,
    context: Tensor | None,
    stats: Tensor | None,
    scores: Tensor | None,
    plan: Plan,
) -> None:
    """Fill context [batch, K, H, DV] and stats, if any, and scores [all rows, H, K], if any."""
    shape = plan.shape
    tiles = problem.tiles("k", shape.TILE)
    part_context, part_stats = context, stats
    if stats is not None and not shape.SINGLE:
        parts = tiles, shape.K, shape.H
        part_context, part_stats = stats.new_empty((*parts, shape.DV)), stats.new_empty((*parts, 2))
    additive_attention_keys_fwd_kernel[(tiles, shape.H, -(-shape.K // shape.GROUP))](
        problem.inputs,
        part_context,
        part_stats,
        scores,
        problem.batch,
        problem.rows_k,
        problem.max_k,
        shape,
        plan.half,
        num_warps=plan.warps,
        **plan.registers,
    )
    if part_stats is not stats:
        parts = triton.cdiv(problem.rows_k, shape.TILE)
        tiles = problem.cu_k, problem.rows_k, shape.TILE
        results = context.flatten(1, 2), stats.flatten(1, 2)
        merge_parts(part_context, part_stats, *results, parts, tiles)
