"""Backward for one query a sequence; the counterpart of ``step``."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import tanh_and_derivative
from .rows import attended_keys, find_tile, offset_of, sequence_rows
from .scores import load_weights
from .step import (
    SIZES,
    STAGES,
    Keys,
    Options,
    Rows,
    aligned,
    attended_of,
    dropout_of,
    load_row,
    load_tile,
    step_scores,
)

DWEIGHT_STRIDES = [f"stride_dweight_{axis}" for axis in ("b", "key_row", "key", "head")]
PARTS = tl.constexpr(128)  # of delta, one a tile of keys, that are added at a time


class Incoming(NamedTuple):
    """The sequence's (max, sum), its context's gradient, and where that of its weights begins.

    Without (max, sum) the last is the gradient of the scores.
    """

    stats: tl.tensor | None
    dcontext: tl.tensor | None
    dweights: tl.tensor | None
    stride_dweight_key: tl.tensor


class Records(NamedTuple):
    """What the first of two launches leaves the second, [rows, H] and [tiles, H, 2]."""

    weights_ptr: tl.tensor | None
    dscores_ptr: tl.tensor | None
    delta_ptr: tl.tensor | None


class Gradients(NamedTuple):
    """Where they go: the query's and the score weights' rows, and all keys and values."""

    dquery: tl.tensor | None
    dkey_ptr: tl.tensor | None
    dvalue_ptr: tl.tensor | None
    dweight: tl.tensor | None


class Tile(NamedTuple):
    """Keys as the program holds them, [SEGMENT] each."""

    position: tl.tensor
    row: tl.tensor  # of [rows, H]
    inside: tl.tensor  # whether there is one
    attended: tl.tensor


@triton.jit
def tile_range(cu_k_ptr, sequence, rows_k, tiles, SEGMENT: tl.constexpr):
    """(first, count) of the tiles of a sequence; ``tiles`` is the count of a padded one."""
    if cu_k_ptr is None:
        return sequence.to(tl.int64) * tiles, tiles
    else:
        first = offset_of(cu_k_ptr, sequence, rows_k) // SEGMENT + sequence
        end = offset_of(cu_k_ptr, sequence + 1, rows_k) // SEGMENT + sequence + 1
        return first, end - first


@triton.jit
def weights_and_gradients(rows, incoming, tile, options):
    """``w_j``, or 0 without stats, and ``dcontext . value_j + dweights_j``, [SEGMENT] each."""
    weights = tl.zeros((options.SEGMENT,), tl.float32)
    if incoming.stats is not None:
        scores = step_scores(rows, tile.position, tile.attended, options, False)
        largest = tl.load(incoming.stats)
        total = tl.load(incoming.stats + 1)
        weights = tl.exp(tl.where(tile.attended, scores - largest, -float("inf")))
        weights = weights / tl.where(total == 0.0, 1.0, total)
    gradient = tl.zeros((options.SEGMENT,), tl.float32)
    if incoming.dcontext is not None:
        value_rows = rows.value + tile.position * rows.stride_vt
        sums = tl.zeros((options.SEGMENT, options.BLOCK_DV), tl.float32)
        for begin in tl.range(0, options.DV, options.BLOCK_DV, num_stages=STAGES):
            d = begin + tl.arange(0, options.BLOCK_DV)
            dcontext = load_row(incoming.dcontext, d, options.DV)
            sums += dcontext[None, :] * load_tile(value_rows, tile.attended, d, options.DV)
        gradient = tl.sum(sums, 1)
    if incoming.dweights is not None:
        dweights_rows = incoming.dweights + tile.position * incoming.stride_dweight_key
        gradient += tl.load(dweights_rows, mask=tile.attended, other=0.0).to(tl.float32)
    return weights, gradient


@triton.jit
def sum_parts(parts_ptr, count, H: tl.constexpr):
    """The sums of ``count`` parts of delta and of the sum of weights, 2 H apart."""
    deltas = tl.zeros((PARTS,), tl.float32)
    sums = tl.zeros((PARTS,), tl.float32)
    for begin in range(0, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        parts = parts_ptr + part * (2 * H)
        deltas += tl.load(parts, mask=part < count, other=0.0)
        sums += tl.load(parts + 1, mask=part < count, other=0.0)
    return tl.sum(deltas, 0), tl.sum(sums, 0)


@triton.jit
def store_dvalue(dvalue_ptr, dcontext_row, weights, tile, options):
    """``dvalue_j = w'_j dcontext`` from weights [SEGMENT]."""
    for begin in range(0, options.DV, options.BLOCK_DV):
        d = begin + tl.arange(0, options.BLOCK_DV)
        dvalue = weights[:, None] * load_row(dcontext_row, d, options.DV)[None, :]
        tl.store(
            dvalue_ptr + tile.row[:, None] * options.DV + d[None, :],
            dvalue.to(dvalue_ptr.dtype.element_ty),
            mask=tile.inside[:, None] & (d < options.DV)[None, :],
        )


@triton.jit
def store_feature_gradients(
    rows, gradients, dscores, tile, has_query, options, SUM_IS_0: tl.constexpr
):
    """``dkey``, ``dquery`` where there is one, and ``dscore_weight`` from dscores [SEGMENT].

    ``SUM_IS_0`` is said of the dscores.
    """
    D: tl.constexpr = options.D
    key_rows = rows.key + tile.position * rows.stride_kt
    for begin in tl.range(0, D, options.BLOCK_D, num_stages=STAGES):
        d = begin + tl.arange(0, options.BLOCK_D)
        x = load_tile(key_rows, tile.attended, d, D) + load_row(rows.query, d, D)[None, :]
        tanh, slope = tanh_and_derivative(x, True, options.USE_PTX)
        weight = load_weights(rows.score_weight, d, D, D % options.BLOCK_D != 0)
        dkey = weight[None, :] * (dscores[:, None] * slope)
        if gradients.dkey_ptr is not None:
            tl.store(
                gradients.dkey_ptr + tile.row[:, None] * D + d[None, :],
                dkey.to(gradients.dkey_ptr.dtype.element_ty),
                mask=tile.inside[:, None] & (d < D)[None, :],
            )
        if gradients.dquery is not None:
            if SUM_IS_0:
                # A slope that all keys have in common does not matter; without it their rounding
                # errors do not either.
                common = tl.min(tl.where(tile.attended[:, None], slope, 1.0), 0)
                dkey = weight[None, :] * (dscores[:, None] * (slope - common[None, :]))
            tl.store(
                gradients.dquery + d,
                tl.sum(dkey, 0).to(gradients.dquery.dtype.element_ty),
                mask=d < tl.where(has_query, D, 0),
            )
        if gradients.dweight is not None:
            dweight = tl.sum(dscores[:, None] * tanh, 0)
            tl.store(gradients.dweight + d, dweight, mask=d < D)


@triton.jit
def step_gradients_of_tile(
    rows,
    keys,
    incoming,
    records,
    gradients,
    start,
    extent,
    has_query,
    number,
    first_number,
    count,
    options,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """What :func:`additive_attention_step_bwd_kernel` writes for SEGMENT keys.

    Args:
        rows, keys, incoming, records, gradients, options: as their types say.
        start, extent: of all the keys of the sequence, as ``rows.sequence_rows`` gives them.
        has_query: whether ``dquery`` is of a query.
        number, first_number, count: of this tile, of the sequence's first one; its tiles.
    """
    position = keys.first + tl.arange(0, options.SEGMENT)
    inside = position < extent
    row = (keys.place * keys.rows_k + start + position) * options.H + keys.head
    tile = Tile(position, row, inside, attended_of(keys, position) & inside)
    keep = dropout_of(keys, position)

    if FIRST:
        weights, gradient = weights_and_gradients(rows, incoming, tile, options)
        gradient *= keep
        delta = tl.sum(weights * gradient, 0)
        sum_of_weights = tl.sum(weights, 0)
        if not LAST:
            part_ptr = records.delta_ptr + (number * options.H + keys.head) * 2
            tl.store(records.weights_ptr + row, weights, mask=inside)
            tl.store(records.dscores_ptr + row, gradient, mask=inside)
            tl.store(part_ptr, delta)
            tl.store(part_ptr + 1, sum_of_weights)
    else:
        weights = tl.load(records.weights_ptr + row, mask=inside, other=0.0)
        gradient = tl.load(records.dscores_ptr + row, mask=inside, other=0.0)
        parts_ptr = records.delta_ptr + (first_number * options.H + keys.head) * 2
        delta, sum_of_weights = sum_parts(parts_ptr, count, options.H)
        tl.debug_barrier()  # all has been read before it is replaced

    if LAST:
        dscores = gradient
        if incoming.stats is not None:
            # Rounded weights need not sum to 1, but score gradients to 0.
            delta = delta / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
            dscores = weights * (gradient - delta)
            weights *= keep
        if records.dscores_ptr is not None:
            tl.store(records.dscores_ptr + row, dscores, mask=inside)
            tl.store(records.weights_ptr + row, weights, mask=inside)
        if gradients.dvalue_ptr is not None:
            store_dvalue(gradients.dvalue_ptr, incoming.dcontext, weights, tile, options)
        by_row = (gradients.dquery is not None) | (gradients.dkey_ptr is not None)
        if by_row | (gradients.dweight is not None):
            store_feature_gradients(
                rows,
                gradients,
                dscores,
                tile,
                has_query,
                options,
                options.SINGLE and incoming.stats is not None,
            )


@triton.jit(do_not_specialize=SIZES + DWEIGHT_STRIDES)
def additive_attention_step_bwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    score_weight_ptr,
    dcontext_ptr,
    dweights_ptr,
    stats_ptr,
    weights_ptr,
    dscores_ptr,
    delta_ptr,
    dquery_ptr,
    dkey_ptr,
    dvalue_ptr,
    dweight_ptr,
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    batch,
    rows_k,
    max_seqlen_k,
    tiles,
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
    stride_cb,
    stride_ch,
    stride_wh,
    stride_dweight_b,
    stride_dweight_key_row,
    stride_dweight_key,
    stride_dweight_head,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINGLE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Weights ``w'`` after dropout, score gradients ``s``, and all that follows from them.

    ``s_j = w_j (g_j - delta)``, ``g_j = (dcontext . value_j + dweights_j) (dropout's scale)``,
    ``delta = sum_j w_j g_j``; ``dvalue_j = w'_j dcontext``, ``dkey_jd = w_d s_j (1 - tanh_jd^2)``,
    ``dquery_d = sum_j dkey_jd``, ``dscore_weight_d = sum_j s_j tanh_jd``.

    A sequence of one tile is FIRST and LAST at once. Others take two launches: the first leaves
    ``w_j``, ``g_j`` (in ``dscores``) and each tile's parts of delta and of the sum of ``w``, the
    second does the rest.
    ``dquery`` is that of a sequence with SINGLE, else float32 of a tile, as always ``dweight``.
    Without ``stats``, ``dweights`` are ``s`` as they are and one launch does: FIRST and LAST.
    """
    rows_k = rows_k.to(tl.int64)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first = find_tile(cu_k_ptr, tile, batch, rows_k, SEGMENT)
    place, start, extent = sequence_rows(cu_k_ptr, sequence, batch, rows_k)
    if first >= extent:
        if (first > 0) | (sequence >= batch):  # else there still is a query whose gradient is 0
            return
    _, _, length = attended_keys(cu_k_ptr, key_lengths_ptr, sequence, batch, rows_k, max_seqlen_k)
    query = tl.minimum(sequence, batch - 1).to(tl.int64)  # rows of nobody need some query
    # With SINGLE later tiles hold keys past an understated bound, which nothing attends to.
    has_query = sequence < batch
    if SINGLE:
        has_query = has_query & (first == 0)
    stride_kt = aligned(stride_kt, ALIGNMENT)
    stride_vt = aligned(stride_vt, ALIGNMENT)
    query_row = query_ptr + query * aligned(stride_qb, ALIGNMENT)
    key_rows = key_ptr + place * aligned(stride_kb, ALIGNMENT) + start * stride_kt
    value_rows = value_ptr + place * aligned(stride_vb, ALIGNMENT) + start * stride_vt
    rows = Rows(
        query_row + head * aligned(stride_qh, ALIGNMENT),
        key_rows + head * aligned(stride_kh, ALIGNMENT),
        stride_kt,
        value_rows + head * aligned(stride_vh, ALIGNMENT),
        stride_vt,
        score_weight_ptr + head * aligned(stride_wh, ALIGNMENT),
    )
    keys = Keys(
        sequence,
        head,
        place,
        rows_k,
        first,
        length,
        padding_mask_ptr,
        seed_ptr,
        threshold,
        dropout_scale,
    )
    dcontext_row = dcontext_ptr
    if dcontext_ptr is not None:
        dcontext_row += query * aligned(stride_cb, ALIGNMENT) + head * aligned(stride_ch, ALIGNMENT)
    dweights_row = dweights_ptr
    if dweights_ptr is not None:
        dweights_row += query * stride_dweight_b + start * stride_dweight_key_row
        dweights_row += head * stride_dweight_head
    dquery_row = dquery_ptr
    if dquery_ptr is not None:
        dquery_row += ((sequence if SINGLE else tile).to(tl.int64) * H + head) * D
    dweight_row = dweight_ptr
    if dweight_ptr is not None:
        dweight_row += (tile.to(tl.int64) * H + head) * D
    stats_row = stats_ptr
    if stats_ptr is not None:
        stats_row += (query * H + head) * 2
    first_tile, count = tile_range(cu_k_ptr, query, rows_k, tiles, SEGMENT)
    for half in tl.static_range(2):
        if (extent - first <= SEGMENT // 2) == half:
            step_gradients_of_tile(
                rows,
                keys,
                Incoming(stats_row, dcontext_row, dweights_row, stride_dweight_key),
                Records(weights_ptr, dscores_ptr, delta_ptr),
                Gradients(dquery_row, dkey_ptr, dvalue_ptr, dweight_row),
                start,
                extent,
                has_query,
                tile,
                first_tile,
                count,
                Options(
                    H, D, DV, SEGMENT >> half, BLOCK_D << half, BLOCK_DV << half, SINGLE, USE_PTX
                ),
                FIRST,
                LAST,
            )


@triton.jit(do_not_specialize=["rows_k", "tiles"])
def sum_tiles_kernel(
    partial_ptr,
    dquery_ptr,
    cu_k_ptr,
    rows_k,
    tiles,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """``dquery`` of a sequence and head: the sum of its tiles' parts [tiles, H, D]."""
    sequence = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first, count = tile_range(cu_k_ptr, sequence, rows_k.to(tl.int64), tiles, SEGMENT)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(count):
            source = partial_ptr + ((first + part) * H + head) * D + d
            sums += tl.load(source, mask=d < D, other=0.0)
        target = dquery_ptr + (sequence.to(tl.int64) * H + head) * D + d
        tl.store(target, sums.to(dquery_ptr.dtype.element_ty), mask=d < D)
