"""Backward for one query a sequence; the counterpart of ``step``."""

import triton
import triton.language as tl

from .arithmetic import dropout_scales, tanh_and_derivative
from .rows import are_attended, attended_keys, find_tile, offset_of, sequence_rows
from .scores import load_weights
from .step import SIZES, STAGES, aligned, load_row, load_tile, step_scores


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
def step_gradients_of_tile(
    query_row,
    key_rows_ptr,
    stride_kt,
    value_rows_ptr,
    stride_vt,
    weight_row,
    dcontext_row,
    dweights_row,
    stride_dweight_key,
    stats_row,
    weights_ptr,
    dscores_ptr,
    delta_ptr,
    dquery_row,
    dkey_ptr,
    dvalue_ptr,
    dweight_row,
    cu_k_ptr,
    padding_mask_ptr,
    seed_ptr,
    threshold,
    dropout_scale,
    place,
    start,
    rows_k,
    tile,
    tiles,
    sequence,
    query,
    head,
    first,
    extent,
    length,
    has_query,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINGLE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """What :func:`additive_attention_step_bwd_kernel` writes for keys [first, first + SEGMENT).

    ``key_rows_ptr`` and ``value_rows_ptr`` are row 0 of the sequence, which starts at row ``start``
    of its place; tiles are of TILE keys.
    """
    position = first + tl.arange(0, SEGMENT)
    inside = position < extent
    attended = are_attended(padding_mask_ptr, place, rows_k, position, length) & inside
    key_row = (place * rows_k + start + position) * H + head
    key_rows = key_rows_ptr + position * stride_kt
    value_rows = value_rows_ptr + position * stride_vt
    keep = tl.full((SEGMENT,), 1.0, tl.float32)
    if seed_ptr is not None:
        keep = dropout_scales(
            seed_ptr, threshold, dropout_scale, sequence, head, position * 0, position
        )

    if FIRST:
        scores = step_scores(
            query_row, key_rows, attended, weight_row, D, SEGMENT, BLOCK_D, USE_PTX
        )
        largest = tl.load(stats_row)
        total = tl.load(stats_row + 1)
        weights = tl.exp(tl.where(attended, scores - largest, -float("inf")))
        weights = weights / tl.where(total == 0.0, 1.0, total)
        gradient = tl.zeros((SEGMENT,), tl.float32)
        if dcontext_row is not None:
            sums = tl.zeros((SEGMENT, BLOCK_DV), tl.float32)
            for begin in tl.range(0, DV, BLOCK_DV, num_stages=STAGES):
                d = begin + tl.arange(0, BLOCK_DV)
                dcontext = load_row(dcontext_row, d, DV)
                sums += dcontext[None, :] * load_tile(value_rows, attended, d, DV)
            gradient = tl.sum(sums, 1)
        if dweights_row is not None:
            dweights_rows = dweights_row + position * stride_dweight_key
            gradient += tl.load(dweights_rows, mask=attended, other=0.0).to(tl.float32)
        gradient *= keep
        delta = tl.sum(weights * gradient, 0)
        sum_of_weights = tl.sum(weights, 0)
        if not LAST:
            tl.store(weights_ptr + key_row, weights, mask=inside)
            tl.store(dscores_ptr + key_row, gradient, mask=inside)
            tl.store(delta_ptr + (tile * H + head) * 2, delta)
            tl.store(delta_ptr + (tile * H + head) * 2 + 1, sum_of_weights)
    else:
        weights = tl.load(weights_ptr + key_row, mask=inside, other=0.0)
        gradient = tl.load(dscores_ptr + key_row, mask=inside, other=0.0)
        first_tile, count = tile_range(cu_k_ptr, query, rows_k, tiles, TILE)
        deltas = tl.zeros((128,), tl.float32)
        sums = tl.zeros((128,), tl.float32)
        for begin in range(0, count, 128):
            part = begin + tl.arange(0, 128)
            parts = delta_ptr + ((first_tile + part) * H + head) * 2
            deltas += tl.load(parts, mask=part < count, other=0.0)
            sums += tl.load(parts + 1, mask=part < count, other=0.0)
        delta = tl.sum(deltas, 0)
        sum_of_weights = tl.sum(sums, 0)
        tl.debug_barrier()  # all has been read before it is replaced

    if LAST:
        # Rounded weights need not sum to 1, but score gradients to 0.
        delta = delta / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
        dscores = weights * (gradient - delta)
        weights *= keep
        if dscores_ptr is not None:
            tl.store(dscores_ptr + key_row, dscores, mask=inside)
            tl.store(weights_ptr + key_row, weights, mask=inside)
        if dvalue_ptr is not None:
            for begin in range(0, DV, BLOCK_DV):
                d = begin + tl.arange(0, BLOCK_DV)
                dvalue = weights[:, None] * load_row(dcontext_row, d, DV)[None, :]
                tl.store(
                    dvalue_ptr + key_row[:, None] * DV + d[None, :],
                    dvalue.to(dvalue_ptr.dtype.element_ty),
                    mask=inside[:, None] & (d < DV)[None, :],
                )
        if (dquery_row is not None) | (dkey_ptr is not None) | (dweight_row is not None):
            for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                d = begin + tl.arange(0, BLOCK_D)
                x = load_tile(key_rows, attended, d, D) + load_row(query_row, d, D)[None, :]
                tanh, slope = tanh_and_derivative(x, True, USE_PTX)
                weight = load_weights(weight_row, d, D, D % BLOCK_D != 0)
                dkey = weight[None, :] * (dscores[:, None] * slope)
                if dkey_ptr is not None:
                    tl.store(
                        dkey_ptr + key_row[:, None] * D + d[None, :],
                        dkey.to(dkey_ptr.dtype.element_ty),
                        mask=inside[:, None] & (d < D)[None, :],
                    )
                if dquery_row is not None:
                    if SINGLE:
                        # As the dscores of all keys sum to 0, a slope that all have in common does
                        # not matter; without it their rounding errors do not either.
                        common = tl.min(tl.where(attended[:, None], slope, 1.0), 0)
                        dkey = weight[None, :] * (dscores[:, None] * (slope - common[None, :]))
                    tl.store(
                        dquery_row + d,
                        tl.sum(dkey, 0).to(dquery_row.dtype.element_ty),
                        mask=d < tl.where(has_query, D, 0),
                    )
                if dweight_row is not None:
                    dweight = tl.sum(dscores[:, None] * tanh, 0)
                    tl.store(dweight_row + d, dweight, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
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
    key_rows_ptr = key_ptr + place * aligned(stride_kb, ALIGNMENT) + start * stride_kt
    value_rows_ptr = value_ptr + place * aligned(stride_vb, ALIGNMENT) + start * stride_vt
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
    for half in tl.static_range(2):
        if (extent - first <= SEGMENT // 2) == half:
            step_gradients_of_tile(
                query_ptr
                + query * aligned(stride_qb, ALIGNMENT)
                + head * aligned(stride_qh, ALIGNMENT),
                key_rows_ptr + head * aligned(stride_kh, ALIGNMENT),
                stride_kt,
                value_rows_ptr + head * aligned(stride_vh, ALIGNMENT),
                stride_vt,
                score_weight_ptr + head * aligned(stride_wh, ALIGNMENT),
                dcontext_row,
                dweights_row,
                stride_dweight_key,
                stats_ptr + (query * H + head) * 2,
                weights_ptr,
                dscores_ptr,
                delta_ptr,
                dquery_row,
                dkey_ptr,
                dvalue_ptr,
                dweight_row,
                cu_k_ptr,
                padding_mask_ptr,
                seed_ptr,
                threshold,
                dropout_scale,
                place,
                start,
                rows_k,
                tile,
                tiles,
                sequence,
                query,
                head,
                first,
                extent,
                length,
                has_query,
                H,
                D,
                DV,
                SEGMENT,
                SEGMENT >> half,
                BLOCK_D << half,
                BLOCK_DV << half,
                SINGLE,
                FIRST,
                LAST,
                USE_PTX,
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
