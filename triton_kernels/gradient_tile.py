"""The inner loops of the gradient kernel: a tile of rows against all columns of their sequence.

Each thread holds one pair of features (d, d + HALF) of all rows, so that no sum crosses threads;
the rows are ROW_TILES tensors of TILE_ROWS rows, so that a sum over rows is a chain of
multiply-adds.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import as_float32, exp_twice, factored_pair, tanh_and_derivative

TILE_ROWS = tl.constexpr(4)  # what one 16-byte load of score gradients serves


class Side(NamedTuple):
    """The rows, or the columns, of a sequence and head, from its first on; keys may have a mask."""

    ptr: tl.tensor
    stride: tl.tensor
    mask_ptr: tl.tensor | None


class Scores(NamedTuple):
    """Gradients of scores, from that of the first row and column on."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_col: tl.tensor


class Gradients(NamedTuple):
    """Where gradients of rows go, from the first on, and sums of columns; None: not wanted.

    The sums are [columns, 2 BLOCK_D] float32, begun by the first tile of rows.
    """

    drow_ptr: tl.tensor | None
    column_sums_ptr: tl.tensor | None


class Options(NamedTuple):
    """Known to the compiler as long as no variable holds them: to be made where they are passed."""

    H: tl.constexpr
    D: tl.constexpr
    HALF: tl.constexpr
    BLOCK_D: tl.constexpr
    ROW_TILES: tl.constexpr
    CONTIGUOUS_SCORES: tl.constexpr
    MASK_SCORES: tl.constexpr
    WANT_WEIGHT: tl.constexpr
    DIRECT: tl.constexpr
    REFINE: tl.constexpr
    USE_PTX: tl.constexpr


@triton.jit
def existing(pair, D: tl.constexpr, HALF: tl.constexpr):
    """Which first and second features of pairs there are."""
    exists0 = pair < HALF
    return exists0, exists0 & (pair + HALF < D)


@triton.jit
def load_weights_times_4(score_weight_ptr, pair, D: tl.constexpr, HALF: tl.constexpr):
    exists0, exists1 = existing(pair, D, HALF)
    weight0 = 4.0 * tl.load(score_weight_ptr + pair, mask=exists0, other=0.0).to(tl.float32)
    weight1 = 4.0 * tl.load(score_weight_ptr + pair + HALF, mask=exists1, other=0.0).to(tl.float32)
    return weight0, weight1


@triton.jit
def load_rows(rows, row, length, pair, options):
    """Both features of TILE_ROWS rows, exponentiated unless DIRECT."""
    exists0, exists1 = existing(pair, options.D, options.HALF)
    attended = (row < length)[:, None]
    if rows.mask_ptr is not None:
        attended &= (tl.load(rows.mask_ptr + row, mask=row < length, other=1) == 0)[:, None]
    features = rows.ptr + row[:, None] * rows.stride + pair[None, :]
    # What is not attended may hold anything, NaN included: its score gradients are 0.
    x0 = tl.load(features, mask=attended & exists0[None, :], other=0.0).to(tl.float32)
    x1 = tl.load(features + options.HALF, mask=attended & exists1[None, :], other=0.0)
    x1 = x1.to(tl.float32)
    if not options.DIRECT:
        x0 = exp_twice(x0, options.REFINE)
        x1 = exp_twice(x1, options.REFINE)
    return x0, x1


@triton.jit
def load_column(features, mask_ptr, pair, options):
    """Both features of a column, [1, BLOCK_D], exponentiated unless DIRECT."""
    HALF: tl.constexpr = options.HALF
    PADDED: tl.constexpr = (HALF % options.BLOCK_D != 0) | (2 * HALF != options.D)
    exists0, exists1 = existing(pair, options.D, HALF)
    if mask_ptr is not None:
        here = pair < tl.where(tl.load(mask_ptr) == 0, HALF, 0)
        y0 = as_float32(tl.load(features, mask=here, other=0.0), options.USE_PTX)
        y1 = as_float32(tl.load(features + HALF, mask=here & exists1, other=0.0), options.USE_PTX)
    elif PADDED:
        y0 = as_float32(tl.load(features, mask=exists0, other=0.0), options.USE_PTX)
        y1 = as_float32(tl.load(features + HALF, mask=exists1, other=0.0), options.USE_PTX)
    else:
        y0 = as_float32(tl.load(features), options.USE_PTX)
        y1 = as_float32(tl.load(features + HALF), options.USE_PTX)
    if not options.DIRECT:
        y0 = exp_twice(y0, options.REFINE)
        y1 = exp_twice(y1, options.REFINE)
    return y0[None, :], y1[None, :]


@triton.jit
def load_scores(dscores_ptr, stride_row, row, length, options):
    """Score gradients of TILE_ROWS rows and a column, for every feature."""
    if options.CONTIGUOUS_SCORES:
        s = tl.load(dscores_ptr + row)
    elif options.MASK_SCORES:
        s = tl.load(dscores_ptr + row * stride_row, mask=row < length, other=0.0)
    else:
        s = tl.load(dscores_ptr + row * stride_row)
    return tl.broadcast_to(s[:, None], (TILE_ROWS, options.BLOCK_D))


@triton.jit
def halves_and_slopes(x0, x1, y0, y1, options):
    """``h`` and ``1/4 - h^2`` of both features."""
    if options.DIRECT:
        tanh0, slope0 = tanh_and_derivative(x0 + y0, True, options.USE_PTX)
        tanh1, slope1 = tanh_and_derivative(x1 + y1, True, options.USE_PTX)
        return -0.5 * tanh0, -0.5 * tanh1, 0.25 * slope0, 0.25 * slope1
    else:
        h0, h1 = factored_pair(x0, x1, y0, y1, options.USE_PTX)
        return h0, h1, tl.fma(-h0, h0, 0.25), tl.fma(-h1, h1, 0.25)


@triton.jit
def store_pairs(target, values0, values1, inside, pair, D: tl.constexpr, HALF: tl.constexpr):
    """Store both features of rows, [rows, BLOCK_D], where they and the rows are."""
    exists0, exists1 = existing(pair, D, HALF)
    element = target.dtype.element_ty
    tl.store(target, values0.to(element), mask=inside[:, None] & exists0[None, :])
    tl.store(target + HALF, values1.to(element), mask=inside[:, None] & exists1[None, :])


@triton.jit
def tile_gradients(
    rows,
    cols,
    dscores,
    score_weight_ptr,
    gradients,
    first_row,
    length,
    extent,
    columns,
    pair,
    options,
):
    """Write the gradients of rows [first_row, + ROW_TILES TILE_ROWS); add to the column sums.

    Args:
        rows, cols, dscores, gradients, options: as their types say.
        length, extent: rows that count, and rows to write (0 for the others).
        pair: the first features of this program's pairs, [BLOCK_D].

    Returns:
        sums of s h for the two features of each pair, [TILE_ROWS, BLOCK_D].
    """
    HALF: tl.constexpr = options.HALF
    BLOCK_D: tl.constexpr = options.BLOCK_D
    WANT_COL: tl.constexpr = gradients.column_sums_ptr is not None
    line = tl.arange(0, TILE_ROWS).to(tl.int64)
    shape: tl.constexpr = (TILE_ROWS, BLOCK_D)
    dweight0 = tl.zeros(shape, tl.float32)
    dweight1 = tl.zeros(shape, tl.float32)
    row0 = ()
    row1 = ()
    drow0 = ()
    drow1 = ()
    for tile in tl.static_range(options.ROW_TILES):
        row = first_row + tile * TILE_ROWS + line
        x0, x1 = load_rows(rows, row, length, pair, options)
        row0 += (x0,)
        row1 += (x1,)
        drow0 += (tl.zeros(shape, tl.float32),)
        drow1 += (tl.zeros(shape, tl.float32),)

    features = cols.ptr + pair
    col_mask_ptr = cols.mask_ptr
    dscores_ptr = dscores.ptr
    sums = gradients.column_sums_ptr
    if WANT_COL:
        sums += tl.arange(0, BLOCK_D)
    for _ in range(columns):
        y0, y1 = load_column(features, col_mask_ptr, pair, options)
        dcol0 = tl.zeros(shape, tl.float32)
        dcol1 = tl.zeros(shape, tl.float32)
        next0 = ()
        next1 = ()
        for tile in tl.static_range(options.ROW_TILES):
            row = first_row + tile * TILE_ROWS + line
            s = load_scores(dscores_ptr, dscores.stride_row, row, length, options)
            h0, h1, slope0, slope1 = halves_and_slopes(row0[tile], row1[tile], y0, y1, options)
            # fma() keeps s * slope from being computed once and added twice, in three steps.
            next0 += (tl.fma(s, slope0, drow0[tile]),)
            next1 += (tl.fma(s, slope1, drow1[tile]),)
            if WANT_COL:
                dcol0 = tl.fma(s, slope0, dcol0)
                dcol1 = tl.fma(s, slope1, dcol1)
            if options.WANT_WEIGHT:
                dweight0 = tl.fma(s, h0, dweight0)
                dweight1 = tl.fma(s, h1, dweight1)
        drow0 = next0
        drow1 = next1
        if WANT_COL:
            sum0 = tl.sum(dcol0, 0)
            sum1 = tl.sum(dcol1, 0)
            if first_row > 0:
                sum0 += tl.load(sums)
                sum1 += tl.load(sums + BLOCK_D)
            tl.store(sums, sum0)
            tl.store(sums + BLOCK_D, sum1)
            sums += 2 * BLOCK_D
        features += cols.stride
        dscores_ptr += dscores.stride_col
        if col_mask_ptr is not None:
            col_mask_ptr += 1

    if gradients.drow_ptr is not None:
        weight0, weight1 = load_weights_times_4(score_weight_ptr, pair, options.D, HALF)
        for tile in tl.static_range(options.ROW_TILES):
            row = first_row + tile * TILE_ROWS + line
            target = gradients.drow_ptr + row[:, None] * (options.H * options.D) + pair[None, :]
            values0 = drow0[tile] * weight0[None, :]
            values1 = drow1[tile] * weight1[None, :]
            store_pairs(target, values0, values1, row < extent, pair, options.D, HALF)
    return dweight0, dweight1
