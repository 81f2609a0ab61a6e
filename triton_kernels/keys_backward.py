"""Backward over the keys of each sequence; see ``key_tiles``.

``g_kj = (dcontext_k . value_j + dweights_kj) (dropout's scale)``, ``delta_k = sum_j w_kj g_kj`` and
``s_kj = w_kj (g_kj - delta_k)``, the gradient of score ``e_kj``. As delta is of a whole sequence,
there are two launches: the first reads values and leaves w, g and each tile's part of delta, the
second reads keys. For one softmax of one tile (AT_ONCE) the second does it all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .key_scores import add_products, hidden_and_slopes, no_sums, row_sums
from .key_tiles import (
    SIZES,
    STAGES,
    Plan,
    aligned,
    first_branch,
    kept_keys,
    key_tile,
    load_row,
    load_tile,
    program_keys,
    rows_at,
    rows_of,
    store_tile,
)
from .problem import Problem
from .rows import Rows
from .sums import parts_of, sum_parts

PARTS = tl.constexpr(128)  # tiles whose sums are added at a time


class Incoming(NamedTuple):
    """What backward gets. Without stats the ``dweights`` are the gradients of scores."""

    dcontext: Rows | None  # [batch, K, H, DV]
    dweights_ptr: Tensor | None  # [all rows, H, K], or with columns [batch, H, K, columns]
    stats_ptr: Tensor | None  # [batch, K, H, 2], (max, sum)
    scores_ptr: Tensor | None  # [all rows, H, K]


class Records(NamedTuple):
    """Float32 numbers of keys: from the first of two launches to the second, or to be returned."""

    weights_ptr: Tensor | None  # [all rows, H, K], dropped out after the second
    dscores_ptr: Tensor | None  # the same; g from the first, s after the second
    delta_ptr: Tensor | None  # [tiles, K, H, 2], sums of w g and of w


class Gradients(NamedTuple):
    """Contiguous; None where not wanted."""

    query_ptr: Tensor | None  # [batch, H, D]; not SINGLE: float32 [tiles, H, D]
    key_ptr: Tensor | None  # [all rows, H, D]
    gate_ptr: Tensor | None  # the same
    value_ptr: Tensor | None  # [all rows, H, DV]
    score_weight_ptr: Tensor | None  # [H, K, D]; in the kernel float32 [tiles, H, K, D]


@triton.jit
def products_with_values(inputs, dcontext, query, tile, branch, SHAPE: tl.constexpr):
    """``dcontext_k . value_j`` of the GROUP branches from ``branch`` on: a tuple of [SEGMENT]."""
    DV: tl.constexpr = SHAPE.DV
    sums = no_sums(SHAPE.BLOCK_DV, SHAPE)
    if dcontext is not None:
        dcontexts = rows_at(dcontext, query, branch, tile.head, DV)
        stride = aligned(dcontext.by_row, DV)
        values = rows_of(inputs.value, tile, DV)
        for begin in tl.range(0, DV, SHAPE.BLOCK_DV, num_stages=STAGES):
            d = begin + tl.arange(0, SHAPE.BLOCK_DV)
            rows = load_tile(values, tile.attended, d, DV)
            sums = add_products(sums, rows, dcontexts, stride, d, branch, DV, SHAPE)
    return row_sums(sums, SHAPE)


@triton.jit
def weights_and_gradients(inputs, incoming, query, tile, k, products, columns, SHAPE: tl.constexpr):
    """``w_kj``, or 0 without stats, and ``g_kj``, [SEGMENT] each.

    Args:
        query: the sequence, or some other where it has none.
        products: :func:`products_with_values`.
        columns: of dweights, or None where these go by row of keys.
    """
    weights = tl.full((SHAPE.SEGMENT,), 0.0, tl.float32)
    entry = tile.row * SHAPE.K + k
    if incoming.stats_ptr is not None:
        stats_row = incoming.stats_ptr + ((query * SHAPE.K + k) * SHAPE.H + tile.head) * 2
        largest = tl.load(stats_row)
        total = tl.load(stats_row + 1)
        scores = tl.load(incoming.scores_ptr + entry, mask=tile.attended, other=-float("inf"))
        weights = tl.exp(scores - tl.where(largest == -float("inf"), 0.0, largest))
        weights = weights / tl.where(total == 0.0, 1.0, total)
    gradients = products
    if incoming.dweights_ptr is not None:
        if columns is not None:
            entry = ((query * SHAPE.H + tile.head) * SHAPE.K + k) * columns + tile.position
        dweights = tl.load(incoming.dweights_ptr + entry, mask=tile.attended, other=0.0)
        gradients += dweights.to(tl.float32)
    return weights, gradients * kept_keys(inputs.dropout, tile, k)


@triton.jit(do_not_specialize=[*SIZES, "columns"])
def additive_attention_keys_bwd_weights_kernel(
    inputs,  # :class:`rows.Inputs`
    incoming,  # :class:`Incoming`
    records,  # :class:`Records`
    batch,
    rows_k,
    max_seqlen_k,
    columns,
    SHAPE: tl.constexpr,
):
    """The first of two launches."""
    GROUP: tl.constexpr = SHAPE.GROUP
    keys = program_keys(inputs.key_side, batch, rows_k, max_seqlen_k, SHAPE.TILE)
    if keys.sequence >= batch:
        return
    tile = key_tile(keys, inputs.key_side, rows_k, SHAPE)
    branch = first_branch(SHAPE)
    query = keys.sequence.to(tl.int64)
    products = products_with_values(inputs, incoming.dcontext, query, tile, branch, SHAPE)
    for i in tl.static_range(GROUP):
        k = branch + i
        if k < SHAPE.K:
            weights, gradients = weights_and_gradients(
                inputs, incoming, query, tile, k, products[i], columns, SHAPE
            )
            entry = tile.row * SHAPE.K + k
            tl.store(records.weights_ptr + entry, weights, mask=tile.attended)
            tl.store(records.dscores_ptr + entry, gradients, mask=tile.attended)
            part = (tl.program_id(0).to(tl.int64) * SHAPE.K + k) * SHAPE.H + tile.head
            tl.store(records.delta_ptr + part * 2, tl.sum(weights * gradients, 0))
            tl.store(records.delta_ptr + part * 2 + 1, tl.sum(weights, 0))


@triton.jit
def score_gradients(weights, gradients, delta, total):
    """``w (g - delta)``. ``total`` is the sum of the rounded w: these need not sum to 1, but the
    results to 0.
    """
    return weights * (gradients - delta / tl.where(total == 0.0, 1.0, total))


@triton.jit
def finish_records(inputs, records, query, tile, rows_k, SHAPE: tl.constexpr):
    """In the second launch: g becomes s, and w what dropout makes of it."""
    K: tl.constexpr = SHAPE.K
    cu_ptr = inputs.key_side.cu_ptr
    parts = tl.cdiv(rows_k, SHAPE.TILE)
    first, count = parts_of(query, parts, cu_ptr, rows_k, SHAPE.TILE)
    for k in range(K):
        deltas = tl.full((PARTS,), 0.0, tl.float32)
        totals = tl.full((PARTS,), 0.0, tl.float32)
        for begin in range(0, count, PARTS):
            part = begin + tl.arange(0, PARTS)
            delta_row = records.delta_ptr + (((first + part) * K + k) * SHAPE.H + tile.head) * 2
            deltas += tl.load(delta_row, mask=part < count, other=0.0)
            totals += tl.load(delta_row + 1, mask=part < count, other=0.0)
        entry = tile.row * K + k
        weights = tl.load(records.weights_ptr + entry, mask=tile.attended, other=0.0)
        gradients = tl.load(records.dscores_ptr + entry, mask=tile.attended, other=0.0)
        dscores = score_gradients(weights, gradients, tl.sum(deltas, 0), tl.sum(totals, 0))
        weights *= kept_keys(inputs.dropout, tile, k)
        tl.debug_barrier()  # all has been read before it is replaced
        tl.store(records.dscores_ptr + entry, dscores, mask=tile.present)
        tl.store(records.weights_ptr + entry, weights, mask=tile.present)
    tl.debug_barrier()  # other threads of the program read what these have written


@triton.jit
def numbers_of(only, records_ptr, tile, k, SHAPE: tl.constexpr):
    """Numbers [SEGMENT] of branch k: ``only`` if there is but one, else from the records."""
    if SHAPE.K == 1:
        return only
    else:
        return tl.load(records_ptr + tile.row * SHAPE.K + k, mask=tile.attended, other=0.0)


@triton.jit
def store_dvalue(dvalue_ptr, dcontext, weights, records, query, tile, SHAPE: tl.constexpr):
    """``dvalue_j = sum_k w'_kj dcontext_k`` from dropped out weights."""
    K: tl.constexpr = SHAPE.K
    DV: tl.constexpr = SHAPE.DV
    for begin in range(0, DV, SHAPE.BLOCK_DV):
        d = begin + tl.arange(0, SHAPE.BLOCK_DV)
        dvalue = tl.full((SHAPE.SEGMENT, SHAPE.BLOCK_DV), 0.0, tl.float32)
        for k in range(K):
            kept = numbers_of(weights, records.weights_ptr, tile, k, SHAPE)
            row = load_row(rows_at(dcontext, query, k, tile.head, DV), d, DV)
            dvalue += kept[:, None] * row[None, :]
        store_tile(dvalue_ptr, tile, d, dvalue, DV)


@triton.jit
def store_feature_gradients(
    inputs,
    gradients,
    dscores,
    records,
    query,
    has_query,
    tile,
    SHAPE: tl.constexpr,
    SUM_IS_0: tl.constexpr,
):
    """``dkey_j = dh_j (dh / dk)`` and ``dgate_j = dh_j (dh / dg)``, where ``dh_j = sum_k s_kj w_k``
    with score weights w; ``dquery = sum_j dkey_j``, and ``dscore_weight_k = sum_j s_kj h_j``.

    Args:
        has_query: whether ``query`` is the program's sequence, and this the tile to tell.
        SUM_IS_0: that of the dscores.
    """
    K: tl.constexpr = SHAPE.K
    D: tl.constexpr = SHAPE.D
    number = tl.program_id(0).to(tl.int64)
    for begin in tl.range(0, D, SHAPE.BLOCK_D, num_stages=STAGES):
        hidden, by_key, by_gate = hidden_and_slopes(inputs, query, tile, begin, SHAPE)
        d = begin + tl.arange(0, SHAPE.BLOCK_D)
        # Zeros; of several branches shared out among threads as the keys are.
        dhidden = tl.zeros_like(hidden) if K == 1 else hidden * 0.0
        for k in range(K):
            scores = numbers_of(dscores, records.dscores_ptr, tile, k, SHAPE)
            row = tile.head * K + k
            weight = load_row(inputs.score_weight_ptr + row * D, d, D)
            dhidden += scores[:, None] * weight[None, :]
            if gradients.score_weight_ptr is not None:
                row += number * (SHAPE.H * K)
                dweight = tl.sum(scores[:, None] * hidden, 0)
                tl.store(gradients.score_weight_ptr + row * D + d, dweight, mask=d < D)
        if gradients.key_ptr is not None:
            store_tile(gradients.key_ptr, tile, d, dhidden * by_key, D)
        if gradients.gate_ptr is not None:
            store_tile(gradients.gate_ptr, tile, d, dhidden * by_gate, D)
        if gradients.query_ptr is not None:
            if SUM_IS_0:
                # A slope that all keys have in common does not matter; without it their rounding
                # errors do not either.
                by_key -= tl.min(tl.where(tile.attended[:, None], by_key, 1.0), 0)[None, :]
            dquery = tl.sum(dhidden * by_key, 0).to(gradients.query_ptr.dtype.element_ty)
            place = query if SHAPE.SINGLE else number
            target = gradients.query_ptr + (place * SHAPE.H + tile.head) * D + d
            tl.store(target, dquery, mask=d < tl.where(has_query, D, 0))


@triton.jit
def backward_of_tile(arguments, SHAPE: tl.constexpr, AT_ONCE: tl.constexpr):
    """What the second kernel, of these arguments, writes for one tile."""
    inputs, incoming, records, gradients, keys, batch, rows_k, columns = arguments
    tile = key_tile(keys, inputs.key_side, rows_k, SHAPE)
    query = tl.minimum(keys.sequence, batch - 1).to(tl.int64)  # rows of nobody need some query
    weights = None
    dscores = None
    if AT_ONCE:
        products = products_with_values(inputs, incoming.dcontext, query, tile, 0, SHAPE)
        weights, dscores = weights_and_gradients(
            inputs, incoming, query, tile, 0, products[0], columns, SHAPE
        )
        if incoming.stats_ptr is not None:
            delta = tl.sum(weights * dscores, 0)
            dscores = score_gradients(weights, dscores, delta, tl.sum(weights, 0))
            weights *= kept_keys(inputs.dropout, tile, 0)
        if records.dscores_ptr is not None:
            tl.store(records.dscores_ptr + tile.row, dscores, mask=tile.present)
            tl.store(records.weights_ptr + tile.row, weights, mask=tile.present)
    else:
        if incoming.stats_ptr is not None:
            finish_records(inputs, records, query, tile, rows_k, SHAPE)
        if SHAPE.K == 1:
            weights = tl.load(records.weights_ptr + tile.row, mask=tile.attended, other=0.0)
            dscores = tl.load(records.dscores_ptr + tile.row, mask=tile.attended, other=0.0)
    if gradients.value_ptr is not None:
        store_dvalue(gradients.value_ptr, incoming.dcontext, weights, records, query, tile, SHAPE)
    by_key = (gradients.key_ptr is not None) | (gradients.gate_ptr is not None)
    by_sum = (gradients.query_ptr is not None) | (gradients.score_weight_ptr is not None)
    if by_key | by_sum:
        has_query = keys.sequence < batch
        if SHAPE.SINGLE:  # later tiles hold keys past an understated bound
            has_query = has_query & (keys.first == 0)
        store_feature_gradients(
            inputs,
            gradients,
            dscores,
            records,
            query,
            has_query,
            tile,
            SHAPE,
            SHAPE.SINGLE and incoming.stats_ptr is not None,
        )


@triton.jit(do_not_specialize=[*SIZES, "columns"])
def additive_attention_keys_bwd_kernel(
    inputs,  # :class:`rows.Inputs`
    incoming,  # :class:`Incoming`
    records,  # :class:`Records`
    gradients,  # :class:`Gradients`
    batch,
    rows_k,
    max_seqlen_k,
    columns,
    SHAPE: tl.constexpr,
    HALF: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The second of two launches, or the only one."""
    keys = program_keys(inputs.key_side, batch, rows_k, max_seqlen_k, SHAPE.TILE)
    if keys.first >= keys.present:
        if (keys.first > 0) | (keys.sequence >= batch):  # else a query may be there, its gradient 0
            return
    arguments = inputs, incoming, records, gradients, keys, batch, rows_k, columns
    if HALF is None:
        backward_of_tile(arguments, SHAPE, AT_ONCE)
    elif keys.present - keys.first <= HALF.SEGMENT:
        backward_of_tile(arguments, HALF, AT_ONCE)
    else:
        backward_of_tile(arguments, SHAPE, AT_ONCE)


def backward_over_keys(
    problem: Problem,
    incoming: Incoming,
    columns: int | None,
    kept: Records,
    gradients: Gradients,
    plans: tuple[Plan, Plan],
) -> None:
    """Fill the gradients that are not None, and ``kept``.

    Args:
        columns: of ``dweights``, where these do not go by row of keys.
        kept: where weights and score gradients go, or none where they do not matter.
        plans: of two launches.
    """
    first, plan = plans
    inputs = problem.inputs
    shape = plan.shape
    tiles = problem.tiles("k", shape.TILE)
    sizes = problem.batch, problem.rows_k, problem.max_k, columns
    scores = incoming.scores_ptr
    at_once = shape.K == 1 and (shape.SINGLE or scores is None)
    if not at_once and scores is None:
        kept = Records(None, incoming.dweights_ptr, None)
    elif not at_once:
        if kept.weights_ptr is None:
            kept = Records(torch.empty_like(scores), torch.empty_like(scores), None)
        kept = kept._replace(delta_ptr=scores.new_empty((tiles, shape.K, shape.H, 2)))
        grid = tiles, shape.H, -(-shape.K // first.shape.GROUP)
        additive_attention_keys_bwd_weights_kernel[grid](
            inputs, incoming, kept, *sizes, first.shape, num_warps=first.warps
        )
    if incoming.dcontext is None and gradients.value_ptr is not None:
        gradients.value_ptr.zero_()
        gradients = gradients._replace(value_ptr=None)
    query, score_weight = gradients.query_ptr, gradients.score_weight_ptr
    new = inputs.score_weight_ptr.new_zeros
    part_query, part_weight = query, None
    if query is not None and not shape.SINGLE:
        part_query = new((tiles, shape.H, shape.D), dtype=torch.float32)
    if score_weight is not None:
        part_weight = new((tiles, shape.H, shape.K, shape.D), dtype=torch.float32)
    additive_attention_keys_bwd_kernel[(tiles, shape.H)](
        inputs,
        incoming,
        kept,
        gradients._replace(query_ptr=part_query, score_weight_ptr=part_weight),
        *sizes,
        shape,
        plan.half,
        at_once,
        num_warps=plan.warps,
    )
    if part_query is not query:
        parts = triton.cdiv(problem.rows_k, shape.TILE)
        by_tile = problem.cu_k, problem.rows_k, shape.TILE
        sum_parts(part_query, query, problem.batch, parts, by_tile)
    if score_weight is not None:
        sum_parts(part_weight, score_weight, 1, tiles)
