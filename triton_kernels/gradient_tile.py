"""The inner loops of the gradient kernel: a tile of rows against all columns of their sequence.

Each thread holds one pair of features (d, d + HALF) of all rows, so that no sum crosses threads;
the rows are TILES tensors of TILE_ROWS rows, so that a sum over rows is a chain of multiply-adds.
TILES is a power of two, and the tensors are in groups of 1, TILES / 2, TILES / 4 .. 1: any number
of tensors is used by passing by some of the groups after the first.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import as_float32, exp_twice, factored_pair, tanh_and_derivative

TILE_ROWS = tl.constexpr(4)  # what one 16-byte load of score gradients serves


class Side(NamedTuple):
    """The rows, or the columns, of a sequence and head, from its first on; keys may have a mask.

    There is at least one that is attended wherever they are looked at.
    """

    ptr: tl.tensor
    stride: tl.tensor
    mask_ptr: tl.tensor | None
    attended: tl.tensor  # how many count, those of the mask aside


class Scores(NamedTuple):
    """Gradients of scores, from that of the first row and column on."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_col: tl.tensor


class Gradients(NamedTuple):
    """Where gradients of rows and columns go, from the first on; None: not wanted.

    Sums of columns [columns, 2 BLOCK_D] float32 stay with the program until the last rows are in.
    """

    drow_ptr: tl.tensor | None
    dcol_ptr: tl.tensor | None
    column_sums_ptr: tl.tensor | None
    is_first: tl.tensor  # of the tiles of rows
    is_last: tl.tensor
    is_only: tl.tensor


class Options(NamedTuple):
    """Known to the compiler as long as no variable holds them: to be made where they are passed."""

    H: tl.constexpr
    D: tl.constexpr
    HALF: tl.constexpr
    BLOCK_D: tl.constexpr
    CONTIGUOUS_SCORES: tl.constexpr
    MASK_SCORES: tl.constexpr
    WANT_WEIGHT: tl.constexpr
    DIRECT: tl.constexpr
    REFINE: tl.constexpr
    USE_PTX: tl.constexpr


@triton.constexpr_function
def group_count(tiles):
    return tiles.bit_length()


@triton.constexpr_function
def group_size(group, tiles):
    return max(1, tiles >> group) if group else 1


@triton.constexpr_function
def group_begin(group, tiles):
    """The first tensor of a group of so many tensors."""
    return 1 + tiles - (tiles >> (group - 1)) if group else 0


@triton.constexpr_function
def group_of(tile, tiles):
    return sum(tile >= group_begin(group, tiles) for group in range(1, tiles.bit_length()))


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
def are_attended(side, row):
    attended = row < side.attended
    if side.mask_ptr is not None:
        attended &= tl.load(side.mask_ptr + row, mask=attended, other=1) == 0
    return attended


@triton.jit
def load_lines(
    side,
    row,
    pair,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Both features of pairs, [rows, pairs] float32. Past the last row that is attended it is
    repeated; of what a mask leaves out, which may hold anything, NaN included, they are 0."""
    PADDED: tl.constexpr = (HALF % BLOCK_D != 0) | (2 * HALF != D)
    safe_row = tl.minimum(row, side.attended - 1).to(tl.int64)
    features = side.ptr + safe_row[:, None] * side.stride + pair[None, :]
    if side.mask_ptr is not None or PADDED:
        exists0, exists1 = existing(pair, D, HALF)
        attended = are_attended(side, row)[:, None]
        x0 = tl.load(features, mask=attended & exists0[None, :], other=0.0)
        x1 = tl.load(features + HALF, mask=attended & exists1[None, :], other=0.0)
    else:
        x0 = tl.load(features)
        x1 = tl.load(features + HALF)
    return as_float32(x0, USE_PTX), as_float32(x1, USE_PTX)


@triton.jit
def use_groups(first_row, row_tiles, TILES: tl.constexpr):
    """Of each group of tensors its first row, and whether ``row_tiles`` of them use it."""
    group_rows = ()
    used = ()
    for group in tl.static_range(group_count(TILES)):
        if group == 0:
            group_rows += (first_row,)
            used += (True,)
        else:
            before = 1 + ((row_tiles - 1) & (-2 * group_size(group, TILES)))
            group_rows += (first_row + before * TILE_ROWS,)
            used += (((row_tiles - 1) & group_size(group, TILES)) != 0,)
    return group_rows, used


@triton.jit
def row_in_group(tile: tl.constexpr, TILES: tl.constexpr):
    """Of a tensor, from the first of its group on, [TILE_ROWS]."""
    first = (tile - group_begin(group_of(tile, TILES), TILES)) * TILE_ROWS
    return first + tl.arange(0, TILE_ROWS)


@triton.jit
def load_rows(
    side,
    group_rows,
    used,
    pair,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """The first and second features of tiles of rows, two tuples of tensors [TILE_ROWS, pairs], and
    their largest magnitude; 0 of what is not used."""
    largest = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
    rows0 = ()
    rows1 = ()
    for tile in tl.static_range(TILES):
        x0 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        x1 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        if used[group_of(tile, TILES)]:
            row = group_rows[group_of(tile, TILES)] + row_in_group(tile, TILES)
            x0, x1 = load_lines(side, row, pair, D, HALF, BLOCK_D, USE_PTX)
            largest = tl.maximum(largest, tl.maximum(tl.abs(x0), tl.abs(x1)))
        rows0 += (x0,)
        rows1 += (x1,)
    return rows0, rows1, tl.max(tl.max(largest, 1), 0)


@triton.jit
def exponentials(rows, used, REFINE: tl.constexpr):
    """``exp(2x)`` of a tuple of tiles, where they are used."""
    found = ()
    for tile in tl.static_range(len(rows)):
        x = rows[tile]
        if used[group_of(tile, len(rows))]:
            x = exp_twice(x, REFINE)
        found += (x,)
    return found


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
def load_scores(dscores_ptr, stride_row, row, attended, options):
    """Score gradients of TILE_ROWS rows and a column, for every feature."""
    if options.CONTIGUOUS_SCORES:
        s = tl.load(dscores_ptr + row)
    elif options.MASK_SCORES:
        s = tl.load(dscores_ptr + row * stride_row, mask=row < attended, other=0.0)
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
def group_and_column(
    rows0,
    rows1,
    drow0,
    drow1,
    dcol0,
    dcol1,
    dweight0,
    dweight1,
    y0,
    y1,
    dscores_ptr,
    stride_row,
    group_row,
    attended,
    group: tl.constexpr,
    WANT_COL: tl.constexpr,
    options,
):
    """The sums with what a group of tensors and a column add to them."""
    TILES: tl.constexpr = len(rows0)
    next0 = ()
    next1 = ()
    for tile in tl.static_range(group_begin(group, TILES), group_begin(group + 1, TILES)):
        row = row_in_group(tile, TILES)
        s = load_scores(dscores_ptr, stride_row, row, attended - group_row, options)
        h0, h1, slope0, slope1 = halves_and_slopes(rows0[tile], rows1[tile], y0, y1, options)
        # fma() keeps s * slope from being computed once and added twice, in three steps.
        next0 += (tl.fma(s, slope0, drow0[tile]),)
        next1 += (tl.fma(s, slope1, drow1[tile]),)
        if WANT_COL and tile == 0:
            dcol0 = s * slope0
            dcol1 = s * slope1
        elif WANT_COL:
            dcol0 = tl.fma(s, slope0, dcol0)
            dcol1 = tl.fma(s, slope1, dcol1)
        if options.WANT_WEIGHT:
            dweight0 = tl.fma(s, h0, dweight0)
            dweight1 = tl.fma(s, h1, dweight1)
    return next0, next1, dcol0, dcol1, dweight0, dweight1


@triton.jit
def tile_gradients(
    rows0,
    rows1,
    group_rows,
    used,
    attended,
    extent,
    cols,
    dscores,
    score_weight_ptr,
    gradients,
    pair,
    options,
):
    """Write the gradients of tiles of rows; add to those of the columns.

    Args:
        rows0, rows1: tuples of tiles of their first and second features, exponentiated unless
            DIRECT.
        group_rows, used: as of :func:`use_groups`.
        attended, extent: how many rows count, and how many are to be written.
        cols, dscores, gradients, options: as their types say.
        pair: the first features of this program's pairs, [BLOCK_D].

    Returns:
        sums of s h for the two features of each pair, [TILE_ROWS, BLOCK_D].
    """
    TILES: tl.constexpr = len(rows0)
    HALF: tl.constexpr = options.HALF
    BLOCK_D: tl.constexpr = options.BLOCK_D
    WANT_COL: tl.constexpr = gradients.dcol_ptr is not None
    shape: tl.constexpr = (TILE_ROWS, BLOCK_D)
    exists0, exists1 = existing(pair, options.D, HALF)
    weight0, weight1 = load_weights_times_4(score_weight_ptr, pair, options.D, HALF)
    dweight0 = tl.zeros(shape, tl.float32)
    dweight1 = tl.zeros(shape, tl.float32)
    drow0 = ()
    drow1 = ()
    for _ in tl.static_range(len(rows0)):
        drow0 += (tl.zeros(shape, tl.float32),)
        drow1 += (tl.zeros(shape, tl.float32),)

    features = cols.ptr + pair
    col_mask_ptr = cols.mask_ptr
    dscores_ptr = dscores.ptr
    if WANT_COL:
        dcol = gradients.dcol_ptr + pair
        kept = gradients.column_sums_ptr + tl.arange(0, BLOCK_D)
        element = gradients.dcol_ptr.dtype.element_ty
    for _ in range(cols.attended):
        y0, y1 = load_column(features, col_mask_ptr, pair, options)
        dcol0 = tl.zeros(shape, tl.float32)
        dcol1 = tl.zeros(shape, tl.float32)
        next0 = ()
        next1 = ()
        for group in tl.static_range(group_count(TILES)):
            group0 = ()
            group1 = ()
            for tile in tl.static_range(group_begin(group, TILES), group_begin(group + 1, TILES)):
                group0 += (drow0[tile],)
                group1 += (drow1[tile],)
            if used[group]:
                group0, group1, dcol0, dcol1, dweight0, dweight1 = group_and_column(
                    rows0,
                    rows1,
                    drow0,
                    drow1,
                    dcol0,
                    dcol1,
                    dweight0,
                    dweight1,
                    y0,
                    y1,
                    dscores_ptr + group_rows[group].to(tl.int64) * dscores.stride_row,
                    dscores.stride_row,
                    group_rows[group],
                    attended,
                    group,
                    WANT_COL,
                    options,
                )
            next0 += group0
            next1 += group1
        drow0 = next0
        drow1 = next1
        if WANT_COL:
            sum0 = tl.sum(dcol0, 0)
            sum1 = tl.sum(dcol1, 0)
            is_last = gradients.is_only
            if not gradients.is_only:
                if not gradients.is_first:
                    sum0 += tl.load(kept)
                    sum1 += tl.load(kept + BLOCK_D)
                is_last = gradients.is_last
                if not is_last:
                    tl.store(kept, sum0)
                    tl.store(kept + BLOCK_D, sum1)
            if is_last:
                tl.store(dcol, (sum0 * weight0).to(element), mask=exists0)
                tl.store(dcol + HALF, (sum1 * weight1).to(element), mask=exists1)
            kept += 2 * BLOCK_D
            dcol += options.H * options.D
        features += cols.stride
        dscores_ptr += dscores.stride_col
        if col_mask_ptr is not None:
            col_mask_ptr += 1

    if gradients.drow_ptr is not None:
        for group in tl.static_range(group_count(TILES)):
            if used[group]:
                for tile in tl.static_range(
                    group_begin(group, TILES), group_begin(group + 1, TILES)
                ):
                    row = group_rows[group] + row_in_group(tile, TILES)
                    target = gradients.drow_ptr + row[:, None].to(tl.int64) * (
                        options.H * options.D
                    )
                    target += pair[None, :]
                    values0 = drow0[tile] * weight0[None, :]
                    values1 = drow1[tile] * weight1[None, :]
                    store_pairs(target, values0, values1, row < extent, pair, options.D, HALF)
    return dweight0, dweight1
