"""Gradients of queries, keys and score weights, given the gradients of scores.

The pass is the same for either side: a program keeps a tile of *rows* (of keys, say) and BLOCK_D
pairs of features in registers, goes over the *columns* (queries), and sums

    drow_jd = 4 w_d sum_i s_ij (1/4 - h^2)    dcol_id = 4 w_d sum_j s_ij (1/4 - h^2)
    dscore_weight_d = -2 sum_ij s_ij h        with h = 1 / (1 + exp(2 row_jd) exp(2 col_id)) - 1/2

Each thread holds one pair of features of all rows, so that no sum crosses threads; the rows are
ROW_TILES tensors of TILE_ROWS rows, so that a sum over rows is a chain of multiply-adds.
"""

import triton
import triton.language as tl

from .arithmetic import (
    SMALLEST_GRADIENT_SUM,
    as_float32,
    exp_twice,
    factored_pair,
    in_factored_range,
    tanh_and_derivative,
)
from .rows import attended_keys, find_tile, sequence_rows

SIZES = [
    "batch",
    "rows_r",
    "rows_c",
    "max_seqlen_k",
    "max_columns",
    "items",
    "zero",
    "stride_bound_place",
]
TILE_ROWS = tl.constexpr(4)  # what one 16-byte load of score gradients serves
DIRECT_CHOICE = tl.constexpr(3)  # of how to take a tile of rows, after those by its size


@triton.constexpr_function
def tiles_of_choice(choice, row_tiles):
    """How many TILE_ROWS rows are taken at a time: a whole tile, 3/4, half of it; few directly."""
    return 1 if choice == DIRECT_CHOICE.value else row_tiles - choice * row_tiles // 4


@triton.jit
def column_bound(bound_ptr, stride, count, BLOCK: tl.constexpr):
    """The largest of ``count`` magnitudes."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        bound = tl.load(bound_ptr + index * stride, mask=index < count, other=0.0)
        largest = tl.maximum(largest, bound)
    return tl.max(largest, 0)


@triton.jit
def tile_gradients(
    row_ptr,
    stride_rt,
    col_ptr,
    stride_ct,
    col_mask_ptr,
    score_weight_ptr,
    dscores_ptr,
    stride_score_row,
    stride_score_col,
    drow_ptr,
    column_sums_ptr,
    row_mask_ptr,
    first_row,
    length,
    extent,
    columns,
    pair,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
    CONTIGUOUS_SCORES: tl.constexpr,
    MASK_SCORES: tl.constexpr,
    WANT_COL: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    DIRECT: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Write the gradients of rows [first_row, + ROW_TILES TILE_ROWS); add to the column sums.

    Args:
        row_ptr, col_ptr, dscores_ptr, drow_ptr, masks: row 0 of the sequence (and the head).
        column_sums_ptr: [columns, 2 BLOCK_D] float32, begun by the first tile of rows.
        length, extent: rows that count, and rows to write (0 for the others).
        pair: the first features of this program's pairs, [BLOCK_D].

    Returns:
        sums of s h for the two features of each pair, [TILE_ROWS, BLOCK_D].
    """
    PADDED: tl.constexpr = (HALF % BLOCK_D != 0) | (2 * HALF != D)
    exists0 = pair < HALF
    exists1 = exists0 & (pair + HALF < D)
    line = tl.arange(0, TILE_ROWS).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    shape: tl.constexpr = (TILE_ROWS, BLOCK_D)
    dweight0 = tl.zeros(shape, tl.float32)
    dweight1 = tl.zeros(shape, tl.float32)
    row0 = ()
    row1 = ()
    drow0 = ()
    drow1 = ()
    for tile in tl.static_range(ROW_TILES):
        row = first_row + tile * TILE_ROWS + line
        attended = (row < length)[:, None]
        if row_mask_ptr is not None:
            attended &= (tl.load(row_mask_ptr + row, mask=row < length, other=1) == 0)[:, None]
        features = row_ptr + row[:, None] * stride_rt + pair[None, :]
        # What is not attended may hold anything, NaN included: its score gradients are 0.
        x0 = tl.load(features, mask=attended & exists0[None, :], other=0.0).to(tl.float32)
        x1 = tl.load(features + HALF, mask=attended & exists1[None, :], other=0.0).to(tl.float32)
        if not DIRECT:
            x0 = exp_twice(x0, REFINE)
            x1 = exp_twice(x1, REFINE)
        row0 += (x0,)
        row1 += (x1,)
        drow0 += (tl.zeros(shape, tl.float32),)
        drow1 += (tl.zeros(shape, tl.float32),)

    features = col_ptr + pair
    sums = column_sums_ptr
    if WANT_COL:
        sums += lane
    for _ in range(columns):
        if col_mask_ptr is not None:
            here = pair < tl.where(tl.load(col_mask_ptr) == 0, HALF, 0)
            y0 = as_float32(tl.load(features, mask=here, other=0.0), USE_PTX)
            y1 = as_float32(tl.load(features + HALF, mask=here & exists1, other=0.0), USE_PTX)
        elif PADDED:
            y0 = as_float32(tl.load(features, mask=exists0, other=0.0), USE_PTX)
            y1 = as_float32(tl.load(features + HALF, mask=exists1, other=0.0), USE_PTX)
        else:
            y0 = as_float32(tl.load(features), USE_PTX)
            y1 = as_float32(tl.load(features + HALF), USE_PTX)
        if not DIRECT:
            y0 = exp_twice(y0, REFINE)
            y1 = exp_twice(y1, REFINE)
        y0 = y0[None, :]
        y1 = y1[None, :]
        dcol0 = tl.zeros(shape, tl.float32)
        dcol1 = tl.zeros(shape, tl.float32)
        next0 = ()
        next1 = ()
        for tile in tl.static_range(ROW_TILES):
            row = first_row + tile * TILE_ROWS + line
            if CONTIGUOUS_SCORES:
                s = tl.load(dscores_ptr + row)
            elif MASK_SCORES:
                s = tl.load(dscores_ptr + row * stride_score_row, mask=row < length, other=0.0)
            else:
                s = tl.load(dscores_ptr + row * stride_score_row)
            s = tl.broadcast_to(s[:, None], shape)
            if DIRECT:
                tanh0, slope0 = tanh_and_derivative(row0[tile] + y0, True, USE_PTX)
                tanh1, slope1 = tanh_and_derivative(row1[tile] + y1, True, USE_PTX)
                h0 = -0.5 * tanh0
                h1 = -0.5 * tanh1
                slope0 = 0.25 * slope0
                slope1 = 0.25 * slope1
            else:
                h0, h1 = factored_pair(row0[tile], row1[tile], y0, y1, USE_PTX)
                slope0 = tl.fma(-h0, h0, 0.25)
                slope1 = tl.fma(-h1, h1, 0.25)
            # fma() keeps s * slope from being computed once and added twice, in three steps.
            next0 += (tl.fma(s, slope0, drow0[tile]),)
            next1 += (tl.fma(s, slope1, drow1[tile]),)
            if WANT_COL:
                dcol0 = tl.fma(s, slope0, dcol0)
                dcol1 = tl.fma(s, slope1, dcol1)
            if WANT_WEIGHT:
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
        features += stride_ct
        dscores_ptr += stride_score_col
        if col_mask_ptr is not None:
            col_mask_ptr += 1

    weight0 = 4.0 * tl.load(score_weight_ptr + pair, mask=exists0, other=0.0).to(tl.float32)
    weight1 = 4.0 * tl.load(score_weight_ptr + pair + HALF, mask=exists1, other=0.0).to(tl.float32)
    if drow_ptr is not None:
        element = drow_ptr.dtype.element_ty
        for tile in tl.static_range(ROW_TILES):
            row = first_row + tile * TILE_ROWS + line
            target = drow_ptr + row[:, None] * (H * D) + pair[None, :]
            inside = (row < extent)[:, None]
            tl.store(
                target,
                (drow0[tile] * weight0[None, :]).to(element),
                mask=inside & exists0[None, :],
            )
            tl.store(
                target + HALF,
                (drow1[tile] * weight1[None, :]).to(element),
                mask=inside & exists1[None, :],
            )
    return dweight0, dweight1


@triton.jit
def store_columns(
    column_sums_ptr,
    dcol_ptr,
    score_weight_ptr,
    columns,
    begun_columns,
    pair,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dcol = 4 w sums``, 0 for the columns after the first ``begun_columns``."""
    exists0 = pair < HALF
    exists1 = exists0 & (pair + HALF < D)
    lane = tl.arange(0, BLOCK_D)
    weight0 = 4.0 * tl.load(score_weight_ptr + pair, mask=exists0, other=0.0).to(tl.float32)
    weight1 = 4.0 * tl.load(score_weight_ptr + pair + HALF, mask=exists1, other=0.0).to(tl.float32)
    element = dcol_ptr.dtype.element_ty
    source = column_sums_ptr + lane
    target = dcol_ptr + pair
    for column in range(columns):
        begun = pair < tl.where(column < begun_columns, HALF, 0)
        sum0 = tl.load(source, mask=begun, other=0.0) * weight0
        sum1 = tl.load(source + BLOCK_D, mask=begun & exists1, other=0.0) * weight1
        tl.store(target, sum0.to(element), mask=exists0)
        tl.store(target + HALF, sum1.to(element), mask=exists1)
        source += 2 * BLOCK_D
        target += H * D


@triton.jit(do_not_specialize=SIZES)
def additive_attention_grad_kernel(
    row_ptr,
    col_ptr,
    score_weight_ptr,
    dscores_ptr,
    row_bound_ptr,
    col_bound_ptr,
    drow_ptr,
    dcol_ptr,
    column_sums_ptr,
    dweight_ptr,
    cu_row_ptr,
    cu_col_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    batch,
    rows_r,
    rows_c,
    max_seqlen_k,
    max_columns,
    items,
    zero,
    stride_rb,
    stride_rt,
    stride_rh,
    stride_cb,
    stride_ct,
    stride_ch,
    stride_wh,
    stride_score_row_start,
    stride_score_col_start,
    stride_score_row,
    stride_score_col,
    stride_score_head,
    stride_bound_place,
    stride_bound_col,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr,
    WHOLE_SEQUENCES: tl.constexpr,
    CONTIGUOUS_SCORES: tl.constexpr,
    MASK_SCORES: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Gradients of one side, or with WHOLE_SEQUENCES and ``dcol`` of both, as in the module's text.

    An item of work is a head, BLOCK_D pairs of features, and a tile of rows or all of a sequence.
    ``column_sums`` is [programs, max_columns, 2 BLOCK_D] float32; ``dweight`` [tiles or sequences,
    H, D] float32 are partial sums. The gradient of a score is at (first row and column of the
    sequence, row, column, head), each with its stride. Past the sequence's last row it is 0 with
    CONTIGUOUS_SCORES, is not read with MASK_SCORES, and else may be anything.
    """
    rows_r = rows_r.to(tl.int64)
    rows_c = rows_c.to(tl.int64)
    BLOCK_ROWS: tl.constexpr = ROW_TILES * TILE_ROWS
    CHUNKS: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    lane = tl.arange(0, BLOCK_D)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(items - tl.program_id(0), programs)):
        item = tl.program_id(0) + turn * programs
        # Of unknown alignment, features are not vectorised: each thread keeps to its own.
        pair = (item % CHUNKS) * BLOCK_D + (lane + zero)
        head = (item // CHUNKS % H).to(tl.int64)
        unit = item // (CHUNKS * H)
        if WHOLE_SEQUENCES:
            sequence = unit
            begin_row = rows_r * 0
        else:
            sequence, begin_row = find_tile(cu_row_ptr, unit, batch, rows_r, BLOCK_ROWS)
        row_place, row_start, extent = sequence_rows(cu_row_ptr, sequence, batch, rows_r)
        col_place, col_start, columns = sequence_rows(cu_col_ptr, sequence, batch, rows_c)
        if ROWS_ARE_KEYS:
            _, _, length = attended_keys(
                cu_row_ptr, key_lengths_ptr, sequence, batch, rows_r, max_seqlen_k
            )
            keys = length
            row_mask_ptr = padding_mask_ptr
            if padding_mask_ptr is not None:
                row_mask_ptr += row_place * rows_r
            col_mask_ptr = None
        else:
            length = extent
            _, _, columns = attended_keys(
                cu_col_ptr, key_lengths_ptr, sequence, batch, rows_c, max_seqlen_k
            )
            keys = columns
            row_mask_ptr = None
            col_mask_ptr = padding_mask_ptr
            if padding_mask_ptr is not None:
                col_mask_ptr += col_place * rows_c
        if keys == 0:
            length = length * 0
        end_row = extent
        if not WHOLE_SEQUENCES:
            end_row = tl.minimum(extent, begin_row + BLOCK_ROWS)

        features = score_weight_ptr + head * stride_wh
        rows_ptr = row_ptr + row_place * stride_rb + row_start * stride_rt + head * stride_rh
        cols_ptr = col_ptr + col_place * stride_cb + col_start * stride_ct + head * stride_ch
        dscores_item = (
            dscores_ptr
            + (row_place * rows_r + row_start) * stride_score_row_start
            + (col_place * rows_c + col_start) * stride_score_col_start
            + head * stride_score_head
        )
        first_row_number = row_place * rows_r + row_start
        drow_item = drow_ptr
        if drow_ptr is not None:
            drow_item += (first_row_number * H + head) * D
        sums_ptr = column_sums_ptr
        if column_sums_ptr is not None:
            slot = tl.program_id(0).to(tl.int64)
            sums_ptr += slot * max_columns * (2 * BLOCK_D)
        all_columns = columns
        columns = tl.minimum(columns, max_columns)
        bound_of_columns = column_bound(
            col_bound_ptr + col_place * stride_bound_place + col_start * stride_bound_col + head,
            stride_bound_col,
            columns,
            128,
        )
        dweight0 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        dweight1 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        for first_row in range(begin_row, end_row, BLOCK_ROWS):
            tile_rows = first_row + tl.arange(0, BLOCK_ROWS)
            attended = tile_rows < length
            if row_mask_ptr is not None:
                attended &= tl.load(row_mask_ptr + tile_rows, mask=attended, other=1) == 0
            bounds = row_bound_ptr + (first_row_number + tile_rows) * H + head
            bound_of_rows = tl.max(tl.load(bounds, mask=attended, other=0.0), 0)
            columns_here = columns.to(tl.int32)
            if first_row >= length:
                columns_here = 0
            # A whole tile, 3/4 or half of one, as the rows left need; or by the direct route, which
            # is rare and takes more registers, a few rows at a time.
            end = tl.minimum(first_row + BLOCK_ROWS, end_row)
            choice = DIRECT_CHOICE
            if in_factored_range(bound_of_rows, bound_of_columns, SMALLEST_GRADIENT_SUM):
                rows_left = (end - first_row).to(tl.int32)
                choice = (rows_left <= BLOCK_ROWS * 3 // 4).to(tl.int32)
                choice += (rows_left <= BLOCK_ROWS // 2).to(tl.int32)
            for option in tl.static_range(DIRECT_CHOICE + 1):
                if choice == option:
                    few = TILE_ROWS * tiles_of_choice(option, ROW_TILES)
                    for row in range(first_row, end, few):
                        more0, more1 = tile_gradients(
                            rows_ptr,
                            stride_rt,
                            cols_ptr,
                            stride_ct,
                            col_mask_ptr,
                            features,
                            dscores_item,
                            stride_score_row,
                            stride_score_col,
                            drow_item,
                            sums_ptr,
                            row_mask_ptr,
                            row,
                            length,
                            extent,
                            columns_here,
                            pair,
                            H,
                            D,
                            HALF,
                            BLOCK_D,
                            tiles_of_choice(option, ROW_TILES),
                            CONTIGUOUS_SCORES,
                            MASK_SCORES,
                            dcol_ptr is not None,
                            dweight_ptr is not None,
                            option == DIRECT_CHOICE,
                            REFINE,
                            USE_PTX,
                        )
                        dweight0 += more0
                        dweight1 += more1
            tl.debug_barrier()  # column sums may be another thread's in the next tile
        if dcol_ptr is not None:
            dcol_item = dcol_ptr + ((col_place * rows_c + col_start) * H + head) * D
            store_columns(
                sums_ptr,
                dcol_item,
                features,
                all_columns.to(tl.int32),
                tl.where(length > 0, columns, 0).to(tl.int32),
                pair,
                H,
                D,
                HALF,
                BLOCK_D,
            )
        if dweight_ptr is not None:
            target = dweight_ptr + (unit.to(tl.int64) * H + head) * D + pair
            exists0 = pair < HALF
            tl.store(target, -2.0 * tl.sum(dweight0, 0), mask=exists0)
            tl.store(target + HALF, -2.0 * tl.sum(dweight1, 0), mask=exists0 & (pair + HALF < D))
