"""The inner loop of the gradient kernel: a tile of rows against all columns of their sequence.

Each thread holds one pair of features (d, d + HALF) of all rows, so that no sum crosses threads.
The rows are TILES tiles of TILE_ROWS, a power of two, in groups of 1, TILES / 2, TILES / 4 .. 1:
any number of tiles is used by passing by some of the groups after the first.

Sums of products with score gradients are of float32, two tensors [TILE_ROWS, BLOCK_D], one for each
feature of a pair; or PACKED ones by :mod:`bf16_sums`, in four tensors [TILE_ROWS / 2, BLOCK_D].
Slopes are ``h^2 - 1/4``, a fourth of tanh's with the other sign.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import as_float32, exp_twice, factored_pair, tanh_and_derivative
from .bf16_sums import add_packed, diagonal_share, packed, packed_slopes
from .route import SMALLEST_GRADIENT_SUM, SMALLEST_ROUGH_SUM, in_factored_range
from .rows import are_attended

TILE_ROWS = tl.constexpr(4)  # what one load of score gradients serves


class Side(NamedTuple):
    """The rows, or the columns, of a sequence and head, from its first on; keys may have a mask."""

    ptr: tl.tensor
    stride: tl.tensor
    mask_ptr: tl.tensor | None
    attended: tl.tensor  # how many count, those of the mask aside


class Item(NamedTuple):
    """Rows of a sequence and head, all its columns, and BLOCK_D pairs of features of both.

    Pointers are to the first of the sequence, None to what is not wanted. Sums of columns
    [columns, 2 BLOCK_D] float32 stay with the program until the last rows are in.
    """

    rows: Side
    cols: Side
    pair: tl.tensor  # [BLOCK_D], the first features
    score_weight_ptr: tl.tensor
    dscores_ptr: tl.tensor
    stride_dscores_row: tl.tensor
    stride_dscores_col: tl.tensor
    drow_ptr: tl.tensor | None
    dcol_ptr: tl.tensor | None
    column_sums_ptr: tl.tensor | None
    dweight_ptr: tl.tensor | None
    begin_row: tl.tensor
    end_row: tl.tensor  # of those that count
    extent: tl.tensor  # the end of those whose gradients are written


class Options(NamedTuple):
    """Constants. Made in the call that takes them: a variable of a kernel would hold tensors."""

    H: tl.constexpr
    D: tl.constexpr
    HALF: tl.constexpr
    BLOCK_D: tl.constexpr
    CONTIGUOUS_SCORES: tl.constexpr
    MASK_SCORES: tl.constexpr
    DIRECT: tl.constexpr
    PACKED: tl.constexpr
    USE_PTX: tl.constexpr


@triton.constexpr_function
def group_count(tiles):
    return tiles.bit_length()


@triton.constexpr_function
def group_begin(group, tiles):
    """The first tile of a group of so many tiles."""
    return 1 + tiles - (tiles >> (group - 1)) if group else 0


@triton.constexpr_function
def group_of(tile, tiles):
    return sum(tile >= group_begin(group, tiles) for group in range(1, tiles.bit_length()))


@triton.jit
def use_groups(first_row, row_tiles, TILES: tl.constexpr):
    """Of each group of tiles its first row, and whether ``row_tiles`` of them use it."""
    group_rows = ()
    used = ()
    for group in tl.static_range(group_count(TILES)):
        if group == 0:
            group_rows += (first_row,)
            used += (True,)
        else:
            before = 1 + ((row_tiles - 1) & (-2 * (TILES >> group)))
            group_rows += (first_row + before * TILE_ROWS,)
            used += (((row_tiles - 1) & (TILES >> group)) != 0,)
    return group_rows, used


@triton.jit
def row_in_group(tile: tl.constexpr, part: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr):
    """Rows of a tile, from the first of its group on: all, or the even or odd PART of them."""
    first = (tile - group_begin(group_of(tile, TILES), TILES)) * TILE_ROWS
    return first + part + PARTS * tl.arange(0, TILE_ROWS // PARTS)


@triton.jit
def existing(pair, options):
    """Which first and second features of pairs there are."""
    exists0 = pair < options.HALF
    return exists0, exists0 & (pair + options.HALF < options.D)


@triton.jit
def load_weights_times_4(score_weight_ptr, pair, options):
    exists0, exists1 = existing(pair, options)
    weight0 = tl.load(score_weight_ptr + pair, mask=exists0, other=0.0)
    weight1 = tl.load(score_weight_ptr + pair + options.HALF, mask=exists1, other=0.0)
    return 4.0 * weight0.to(tl.float32), 4.0 * weight1.to(tl.float32)


@triton.jit
def load_pairs(features, kept, pair, options):
    """Both features of pairs, [rows, pairs] float32, from pointers to the first ones; 0 of rows
    that are not ``kept``, [rows, 1], which may hold anything, NaN included. None: all are."""
    HALF: tl.constexpr = options.HALF
    exists0, exists1 = existing(pair, options)
    if kept is not None:
        x0 = tl.load(features, mask=kept & exists0[None, :], other=0.0)
        x1 = tl.load(features + HALF, mask=kept & exists1[None, :], other=0.0)
    elif HALF % options.BLOCK_D != 0 or 2 * HALF != options.D:
        x0 = tl.load(features, mask=exists0[None, :], other=0.0)
        x1 = tl.load(features + HALF, mask=exists1[None, :], other=0.0)
    else:
        x0 = tl.load(features)
        x1 = tl.load(features + HALF)
    return as_float32(x0, options.USE_PTX), as_float32(x1, options.USE_PTX)


@triton.jit
def load_lines(side, row, pair, options):
    """Both features of pairs of rows. Past the last row that is attended, which there has to be,
    it is repeated; of what a mask leaves out they are 0."""
    safe_row = tl.minimum(row, side.attended - 1).to(tl.int64)
    features = side.ptr + safe_row[:, None] * side.stride + pair[None, :]
    kept = None
    if side.mask_ptr is not None:
        kept = are_attended(side.mask_ptr, row, side.attended)[:, None]
    return load_pairs(features, kept, pair, options)


@triton.jit
def exponentials(x, item, options):
    """``exp(2x)`` of both features, unless DIRECT."""
    REFINE: tl.constexpr = item.rows.ptr.dtype.element_ty == tl.float32
    if options.DIRECT:
        return x
    else:
        return exp_twice(x[0], REFINE), exp_twice(x[1], REFINE)


@triton.jit
def load_rows(item, groups, TILES: tl.constexpr, options):
    """Both features of tiles of rows, of PACKED sums of their even and odd rows, exponentiated
    unless DIRECT; and their largest magnitude. 0 where not used."""
    group_rows, used = groups
    PARTS: tl.constexpr = 2 if options.PACKED else 1
    zeros = tl.zeros((TILE_ROWS // PARTS, options.BLOCK_D), tl.float32)
    largest = zeros
    rows = ()
    for tile in tl.static_range(TILES):
        for part in tl.static_range(PARTS):
            x = zeros, zeros
            if used[group_of(tile, TILES)]:
                row = group_rows[group_of(tile, TILES)] + row_in_group(tile, part, PARTS, TILES)
                x = load_lines(item.rows, row, item.pair, options)
                largest = tl.maximum(largest, tl.maximum(tl.abs(x[0]), tl.abs(x[1])))
                x = exponentials(x, item, options)
            rows += (x,)
    return rows, tl.max(tl.max(largest, 1), 0)


@triton.jit
def load_scores(dscores_ptr, stride_row, first: tl.constexpr, attended, share, options):
    """Score gradients of TILE_ROWS rows and a column, for every feature; PACKED: the lane's share
    of words of two."""
    row = first + tl.arange(0, TILE_ROWS)
    if options.PACKED:
        words = (dscores_ptr + first).to(tl.pointer_type(tl.int32), bitcast=True)
        s = tl.load(words + tl.arange(0, TILE_ROWS // 2)) & share
    elif options.CONTIGUOUS_SCORES:
        s = tl.load(dscores_ptr + row).to(tl.float32)
    elif options.MASK_SCORES:
        s = tl.load(dscores_ptr + row * stride_row, mask=row < attended, other=0.0)
    else:
        s = tl.load(dscores_ptr + row * stride_row).to(tl.float32)
    return tl.broadcast_to(s[:, None], (s.shape[0], options.BLOCK_D))


@triton.jit
def zero_sums(options):
    if options.PACKED:
        zeros = tl.zeros((TILE_ROWS // 2, options.BLOCK_D), tl.float32)
        return zeros, zeros, zeros, zeros
    else:
        zeros = tl.zeros((TILE_ROWS, options.BLOCK_D), tl.float32)
        return zeros, zeros


@triton.jit
def totals(sums, options):
    """Of the first and of the second features, [BLOCK_D]."""
    if options.PACKED:
        return tl.sum(sums[0] + sums[1], 0), tl.sum(sums[2] + sums[3], 0)
    else:
        return tl.sum(sums[0], 0), tl.sum(sums[1], 0)


@triton.jit
def add_products(sums, s, x, options):
    # fma() keeps a product from being computed once and added twice, in three steps.
    if options.PACKED:
        return add_packed(sums, x, s)
    else:
        return tl.fma(s, x[0], sums[0]), tl.fma(s, x[1], sums[1])


@triton.jit
def packed_halves(even, odd, y):
    """``h`` of an even and an odd row."""
    return packed(
        factored_pair(even[0], even[1], y[0], y[1], True),
        factored_pair(odd[0], odd[1], y[0], y[1], True),
    )


@triton.jit
def halves_and_slopes(x, y, options):
    """``h`` and ``h^2 - 1/4`` of both features."""
    if options.DIRECT:
        tanh0, slope0 = tanh_and_derivative(x[0] + y[0], True, options.USE_PTX)
        tanh1, slope1 = tanh_and_derivative(x[1] + y[1], True, options.USE_PTX)
        return (-0.5 * tanh0, -0.5 * tanh1), (-0.25 * slope0, -0.25 * slope1)
    else:
        h0, h1 = factored_pair(x[0], x[1], y[0], y[1], options.USE_PTX)
        return (h0, h1), (tl.fma(h0, h0, -0.25), tl.fma(h1, h1, -0.25))


@triton.jit
def add_column(
    item, rows, groups, y, dscores_ptr, drow, dweight, share, TILES: tl.constexpr, options
):
    """The sums with what a column adds to them, and those of the column alone."""
    group_rows, used = groups
    dcol = zero_sums(options)
    next_drow = ()
    for group in tl.static_range(group_count(TILES)):
        added = ()
        for tile in tl.static_range(group_begin(group, TILES), group_begin(group + 1, TILES)):
            added += (drow[tile],)
        if used[group]:
            added = ()
            for tile in tl.static_range(group_begin(group, TILES), group_begin(group + 1, TILES)):
                s = load_scores(
                    dscores_ptr + group_rows[group].to(tl.int64) * item.stride_dscores_row,
                    item.stride_dscores_row,
                    (tile - group_begin(group, TILES)) * TILE_ROWS,
                    item.end_row - group_rows[group],
                    share,
                    options,
                )
                if options.PACKED:
                    h = packed_halves(rows[2 * tile], rows[2 * tile + 1], y)
                else:
                    h, slope = halves_and_slopes(rows[tile], y, options)
                if item.dweight_ptr is not None:
                    dweight = add_products(dweight, s, h, options)
                if options.PACKED:  # only now: that saves some moves of registers
                    slope = packed_slopes(h)
                added += (add_products(drow[tile], s, slope, options),)
                if item.dcol_ptr is not None:
                    dcol = add_products(dcol, s, slope, options)
        next_drow += added
    return next_drow, dcol, dweight


@triton.jit
def store_pairs(target, values0, values1, inside, pair, options):
    """Store both features of rows, [rows, BLOCK_D], where they and the rows are."""
    exists0, exists1 = existing(pair, options)
    element = target.dtype.element_ty
    tl.store(target, values0.to(element), mask=inside[:, None] & exists0[None, :])
    tl.store(target + options.HALF, values1.to(element), mask=inside[:, None] & exists1[None, :])


@triton.jit
def store_column(kept, dcol, sums, weights, is_first, is_last, pair, options):
    """Add to the sums that are kept of a column; with the last rows its gradient is there."""
    sum0, sum1 = totals(sums, options)
    if not is_first:
        sum0 += tl.load(kept)
        sum1 += tl.load(kept + options.BLOCK_D)
    if is_last:
        exists0, exists1 = existing(pair, options)
        element = dcol.dtype.element_ty
        tl.store(dcol, (sum0 * -weights[0]).to(element), mask=exists0)
        tl.store(dcol + options.HALF, (sum1 * -weights[1]).to(element), mask=exists1)
    else:
        tl.store(kept, sum0)
        tl.store(kept + options.BLOCK_D, sum1)


@triton.jit
def store_rows(item, groups, drow, weights, end, TILES: tl.constexpr, options):
    """The gradients of rows before ``end``."""
    group_rows, used = groups
    PARTS: tl.constexpr = len(drow[0]) // 2
    for tile in tl.static_range(TILES):
        if used[group_of(tile, TILES)]:
            for part in tl.static_range(PARTS):
                row = group_rows[group_of(tile, TILES)] + row_in_group(tile, part, PARTS, TILES)
                target = row[:, None].to(tl.int64) * (options.H * options.D)
                target += item.drow_ptr + item.pair[None, :]
                values0 = drow[tile][part] * -weights[0][None, :]
                values1 = drow[tile][part + PARTS] * -weights[1][None, :]
                store_pairs(target, values0, values1, row < end, item.pair, options)


@triton.jit
def tile_gradients(item, first_row, row_tiles, is_right, col_bound, TILES: tl.constexpr, options):
    """Write the gradients of up to TILES tiles of rows and add to those of the columns; unless
    DIRECT only if these rows and columns factor.

    Args:
        first_row, row_tiles: which tiles.
        is_right: whether the factored form will do for all that was looked at before.
        col_bound: the largest magnitude of the columns.

    Returns:
        sums of s h for the two features of each pair, [BLOCK_D], and whether all is done.
    """
    BF16: tl.constexpr = item.dscores_ptr.dtype.element_ty == tl.bfloat16
    groups = use_groups(first_row, row_tiles, TILES)
    rows, row_bound = load_rows(item, groups, TILES, options)
    columns = item.cols.attended
    end = item.extent
    if not options.DIRECT:
        SMALLEST_SUM: tl.constexpr = SMALLEST_ROUGH_SUM if BF16 else SMALLEST_GRADIENT_SUM
        is_right &= in_factored_range(row_bound, col_bound, SMALLEST_SUM)
        columns = tl.where(is_right, columns, 0)
        end = tl.where(is_right, end, 0)
    is_first = first_row == item.begin_row
    is_last = first_row + row_tiles * TILE_ROWS >= item.end_row
    if item.dcol_ptr is not None:
        weights = load_weights_times_4(item.score_weight_ptr, item.pair, options)
    share = diagonal_share() if options.PACKED else 0
    dweight = zero_sums(options)
    drow = ()
    for _ in tl.static_range(TILES):
        drow += (zero_sums(options),)
    features = item.cols.ptr + item.pair[None, :]
    dscores_ptr = item.dscores_ptr
    if item.dcol_ptr is not None:
        dcol_row = item.dcol_ptr + item.pair
        kept_sums = item.column_sums_ptr + tl.arange(0, options.BLOCK_D)
    for col in range(columns):
        kept = None
        if item.cols.mask_ptr is not None:
            lone = col + tl.arange(0, 1)
            kept = are_attended(item.cols.mask_ptr, lone, item.cols.attended)[:, None]
        y = exponentials(load_pairs(features, kept, item.pair, options), item, options)
        drow, dcol, dweight = add_column(
            item, rows, groups, y, dscores_ptr, drow, dweight, share, TILES, options
        )
        if item.dcol_ptr is not None:
            store_column(kept_sums, dcol_row, dcol, weights, is_first, is_last, item.pair, options)
            dcol_row += options.H * options.D
            kept_sums += 2 * options.BLOCK_D
        features += item.cols.stride
        dscores_ptr += item.stride_dscores_col
    if item.dcol_ptr is not None:
        tl.debug_barrier()  # sums of columns may be another thread's where the next tiles add
    if item.drow_ptr is not None:
        if item.dcol_ptr is None:  # only here, as they would take registers in the loop
            weights = load_weights_times_4(item.score_weight_ptr, item.pair, options)
        store_rows(item, groups, drow, weights, end, TILES, options)
    dweight0, dweight1 = totals(dweight, options)
    return dweight0, dweight1, is_right
